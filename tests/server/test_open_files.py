"""Clients that connect and say nothing leave files for others, however few the system allows."""

import contextlib
import ssl
from pathlib import Path

import httpx
import pytest

from tests.support.answers import refused_connections
from tests.support.authority import Authority
from tests.support.launch import serve
from tests.support.samples import Sample
from tests.support.waiting import until
from tests.support.wire import connect

pytestmark = pytest.mark.usefixtures("small_networks")

FEW_FILES = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sys.argv[0] = "server"
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("has_tls", "files", "workers"),
    [(False, 64, "1"), (False, 64, "2"), (True, 64, "1"), (True, 64, "2"), (True, 256, "1")],
)
def test_silent_clients_do_not_take_all_files(
    tmp_path: Path, photos: list[Sample], has_tls: bool, files: int, workers: str
) -> None:
    flags = ["--head-timeout-s", "600", "--workers", workers]
    trust: ssl.SSLContext | None = None
    if has_tls:
        authority = Authority(tmp_path, "authority")
        trust = ssl.create_default_context(cafile=str(authority.certificate))
        flags += ["--tls-cert", str(authority.issue("server"))]
    verify = trust or True
    command = ["-c", FEW_FILES, str(files)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve(*flags, command=command, trust=trust))
        assert f"not the 1024 of --max-connections: the system allows {files} " in server.log()
        # It is ready when the first worker is.
        until(lambda: server.log().count(" ready: ") == int(workers))
        for _ in range(4):
            for _ in range(100):
                with contextlib.suppress(ConnectionResetError):
                    stack.enter_context(connect(server))
            for path in ("/health/live", "/health/ready", "/metrics"):
                assert httpx.get(server.url + path, verify=verify).status_code == 200
            if has_tls:
                # None of the others has come as far.
                answer = httpx.post(f"{server.url}/segment", content=photos[0].data, verify=verify)
                assert answer.status_code == 200
        text = httpx.get(f"{server.url}/metrics", verify=verify).text
        assert 'slsnet_connections_refused_total{reason="too_many"}' in text
        assert "no_file" not in text
        assert "nobody is accepted" not in server.log()
        server.terminate()
        assert server.wait() == 0


def test_a_handshake_has_its_time(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    flags = ("--head-timeout-s", "4", "--tls-cert", str(authority.issue("server")))

    with serve(*flags, trust=trust) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(20)]
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        until(lambda: refused_connections(server, "handshake_timeout") >= 20)
        with connect(server) as plain:
            plain.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while plain.recv(1000):
                    pass
        until(lambda: refused_connections(server, "handshake_failed") >= 1)
