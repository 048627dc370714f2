"""What the containers' test counts as lost."""

import http.client
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from docker.test.client import load
from tests.support.launch import free_port


@contextmanager
def answering() -> Iterator[str]:
    """A server that answers 200, a request a connection; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"as good as a photo here")
    return str(path)


def test_a_way_in_that_fails_otherwise_than_by_a_closed_port_is_a_loss(
    photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect = http.client.HTTPConnection.connect
    connections = itertools.count(1)

    def no_more(connection: http.client.HTTPConnection) -> None:
        if next(connections) > 60:
            raise TimeoutError("timed out")
        connect(connection)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", no_more)
    with answering() as url, pytest.raises(SystemExit, match="timed out"):
        load(url, photo)
    assert "60 answered, 6 lost" in capsys.readouterr().out


def test_a_server_that_never_was_under_load_proves_nothing(photo: str) -> None:
    with pytest.raises(SystemExit, match="before it was under load"):
        load(f"http://127.0.0.1:{free_port()}", photo)
