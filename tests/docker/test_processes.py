"""What runs in a container beside the server: its first process, and the health check."""

import os
import runpy
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support import ROOT
from tests.support.authority import Authority
from tests.support.launch import free_port, serve
from tests.support.waiting import until

HEALTH = ROOT / "docker/health.py"

# In the image these two lie in the root of the tree, beside `server`.
ENTRYPOINT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "docker/entrypoint.py")!r}, run_name="__main__")
"""


def check(port: int, host: str = "0.0.0.0", **variables: str) -> int:
    environment = {**os.environ, "SLSNET_HOST": host, "SLSNET_PORT": str(port), **variables}
    return subprocess.run([sys.executable, HEALTH], env=environment, timeout=600).returncode


@contextmanager
def answering(status: int, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server that answers everything with `status`; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(HTTPServer):
        def handle_error(self, *_: object) -> None:
            """A handshake that came to nothing."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("small_networks")
def test_health_follows_readiness_through_a_drain() -> None:
    with serve("--drain-grace-s", "30", command=("-c", ENTRYPOINT)) as server:
        until(lambda: check(server.port) == 0)
        server.terminate()
        until(lambda: check(server.port) == 1)
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM


@pytest.mark.usefixtures("small_networks")
def test_entrypoint_drains_and_ends_with_0() -> None:
    with serve("--drain-grace-s", "0", command=("-c", ENTRYPOINT)) as server:
        server.terminate()
        assert server.wait() == 0


def test_health_check_says_no_where_nothing_listens() -> None:
    assert check(free_port()) == 1


def test_health_check_asks_the_program_that_runs() -> None:
    is_well = runpy.run_path(str(HEALTH))["is_well"]

    def well(*words: str) -> bool:
        first = ["/sbin/docker-init", "--", "python", "/opt/slsnet/entrypoint.py", *words, ""]
        result: bool = is_well(first, {"SLSNET_PORT": str(gone), "SLSNET_HOST": "0.0.0.0"})
        return result

    gone = free_port()
    assert not well()
    # Not what another option has for its value.
    assert not well("--root-path", "archive")
    assert well("archive", "fetch", "--all")
    nowhere = ("--health-port", f"{gone}")
    assert not well("archive", "serve", *nowhere)
    for status, answer in ((200, True), (503, False)):
        with answering(status) as port:
            flags = ("--journal=/var/lib/a", "--health-host=0.0.0.0", f"--health-port={port}")
            assert well("archive", "serve", *flags) == answer
            assert well("label-studio", "--server=http://a", "--port", f"{port}")
    assert not well("label-studio", f"--port={gone}")


def test_health_check_says_no_to_any_error() -> None:
    for status in (404, 500, 503):
        with answering(status) as port:
            assert check(port, host="127.0.0.1") == 1


@pytest.mark.parametrize("clients", ["any", "of the server's authority", "of another"])
def test_health_check_under_tls(tmp_path: Path, clients: str) -> None:
    own, other = Authority(tmp_path, "own"), Authority(tmp_path, "other")
    certificate = str(own.issue("server"))
    variables = {"SLSNET_TLS_CERT": certificate}
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    if clients != "any":
        accepted = str((other if clients == "of another" else own).certificate)
        variables["SLSNET_TLS_CLIENT_CA"] = accepted
        tls.verify_mode = ssl.CERT_REQUIRED
        tls.load_verify_locations(accepted)
    for status, code in ((200, 0), (503, 0 if clients == "of another" else 1)):
        with answering(status, tls) as port:
            assert check(port, "127.0.0.1", **variables) == code
    assert check(free_port(), "127.0.0.1", **variables) == 1
    with answering(404) as port:
        assert check(port, "127.0.0.1", **variables) == 1, "no TLS there"


@pytest.mark.usefixtures("small_networks")
def test_a_real_server_with_mutual_tls_is_healthy_once_it_listens(tmp_path: Path) -> None:
    own, other = Authority(tmp_path, "own"), Authority(tmp_path, "other")
    variables = {
        "SLSNET_TLS_CERT": str(own.issue("server")),
        "SLSNET_TLS_CLIENT_CA": str(other.certificate),
    }
    port = free_port()
    environment = {**os.environ, **variables, "SLSNET_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-m", "server"], cwd=ROOT, env=environment) as process:
        until(lambda: process.poll() is not None or not check(port, "127.0.0.1", **variables))
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 0
    assert check(port, "127.0.0.1", **variables) == 1


def test_stop_is_heard_before_the_server_listens_to_it() -> None:
    # A process that is not the first one would be ended by SIGTERM's default; this one must say
    # that it was asked to end, which only a handler does.
    slow = "import builtins, time; builtins.print('up', flush=True); time.sleep(60)"
    code = f"""
import runpy
runpy.run_module = lambda *_, **__: exec({slow!r})
runpy.run_path({str(ROOT / "docker/entrypoint.py")!r}, run_name="__main__")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("program", "says"),
    [("archive", "slsnet archive serve"), ("label-studio", "slsnet_client.label_studio")],
)
def test_entrypoint_runs_other_programs(program: str, says: str) -> None:
    pytest.importorskip("pynetdicom", reason="needs requirements-dicom.txt")
    script = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "client")!r}]
sys.argv = ["entrypoint", {program!r}, "--help"]
runpy.run_path({str(ROOT / "docker/entrypoint.py")!r}, run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert says in ran.stdout
