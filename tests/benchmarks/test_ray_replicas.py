"""What the benchmark of replicas counts as served."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import psutil
import pytest

from benchmarks.deck import Card
from photos.image import read_photo
from tests.support.expected import Expected
from tests.support.offline import Offline
from tests.support.samples import Sample

pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")

from benchmarks.ray_replicas import Figures, NothingAnsweredError, Watched, measure

LATENCY_S = 0.2


@contextmanager
def answering(status: int, mask: bytes) -> Iterator[str]:
    """A server that takes its time; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, b'{"backend": {"precision": "fp32"}}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(LATENCY_S)
            self._send(status, mask)

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def measured(url: str, card: Card) -> Figures:
    watched = Watched({"server": [psutil.Process()]}, [])
    return measure("fake", url, [card], clients=3, seconds=LATENCY_S / 4, processes=lambda: watched)


@pytest.fixture
def card(photos: list[Sample], offline: Offline) -> Card:
    read = read_photo(photos[0].data)
    expected = Expected(offline.probability(read), read.width, read.height)
    return Card("photo", photos[0].data, "image/jpeg", expected)


def test_answers_after_the_time_do_not_count_as_throughput(card: Card) -> None:
    with answering(200, card.expected.png) as url:
        found = measured(url, card)
    assert 0 < found.requests_per_s <= 3 / LATENCY_S
    assert found.lone_ms >= 1000 * LATENCY_S
    assert found.cpu_ms["server"] >= 0
    assert found.failed == 0


def test_server_without_answers_is_reported(card: Card) -> None:
    with answering(500, b"") as url, pytest.raises(NothingAnsweredError, match="fake: no request"):
        measured(url, card)
    with answering(200, b"no mask") as url, pytest.raises(NothingAnsweredError):
        measured(url, card)
