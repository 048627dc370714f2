"""What runs in a container beside the server: its first process, and the health check."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

from benchmarks.launch import free_port, serve

ROOT = Path(__file__).parent.parent.parent
HEALTH = ROOT / "docker/health.py"

# In the image these two lie in the root of the tree, beside `server`.
ENTRYPOINT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "docker/entrypoint.py")!r}, run_name="__main__")
"""


def check(port: int, host: str = "0.0.0.0") -> int:
    environment = {**os.environ, "SLSNET_HOST": host, "SLSNET_PORT": str(port)}
    return subprocess.run([sys.executable, HEALTH], env=environment, timeout=60).returncode


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers everything with `status`; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_health_follows_readiness_through_a_drain() -> None:
    with serve("--drain-grace-s", "30", command=("-c", ENTRYPOINT)) as server:
        assert check(server.port) == 0
        server.terminate()
        time.sleep(0.2)
        assert check(server.port) == 1
        server.terminate()
        assert server.wait() == 128 + signal.SIGTERM


def test_entrypoint_drains_and_ends_with_0() -> None:
    with serve("--drain-grace-s", "0", command=("-c", ENTRYPOINT)) as server:
        server.terminate()
        assert server.wait() == 0


def test_health_check_says_no_where_nothing_listens() -> None:
    assert check(free_port()) == 1


def test_health_check_says_no_to_any_error() -> None:
    for status in (404, 500, 503):
        with answering(status) as port:
            assert check(port, host="127.0.0.1") == 1


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
