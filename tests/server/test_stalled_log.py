"""A reader of the log that stalls costs lines, which are counted, and nothing else."""

import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.answers import figures
from tests.support.launch import ServerProcess, free_port
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")

# Of these, more than fit the pipe and what the server holds back.
LONG = {"X-Request-ID": 128 * "x"}
REQUESTS = 1500


def start(stderr: int, *flags: str) -> ServerProcess:
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), *flags]
    process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL)
    return ServerProcess(process, port, Path(os.devnull))


def answers(server: ServerProcess) -> bool:
    try:
        return httpx.get(f"{server.url}/health/ready", timeout=600).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("flags", "reads_later"),
    [((), False), (("--log-format", "json"), True), (("--workers", "2"), False)],
)
def test_a_log_that_nobody_reads_stops_nothing(
    tmp_path: Path, flags: tuple[str, ...], *, reads_later: bool
) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    # Both ends are open, and nobody reads.
    held = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(held, fcntl.F_SETPIPE_SZ, 4096)
    blocking = os.open(fifo, os.O_WRONLY)
    server = start(blocking, *flags)
    seen = b""

    def is_told() -> bool:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(held, 65536)
        return b"lines of the log were lost" in seen

    try:
        until(lambda: answers(server))
        with httpx.Client(base_url=server.url, timeout=600) as client:
            for _ in range(REQUESTS):
                client.get("/health/live", headers=LONG).raise_for_status()
        if "--workers" not in flags:
            assert 0 < figures(server)["slsnet_log_lines_lost_total"] < REQUESTS
            if reads_later:
                until(is_told)
        server.terminate()
        assert server.wait() == 0
    finally:
        server.process.kill()
        server.process.wait()
        os.close(blocking)
        os.close(held)
