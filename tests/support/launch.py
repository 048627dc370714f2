"""Starts a server process of its own, for tests and benchmarks that measure the real thing."""

import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.support import ROOT

if TYPE_CHECKING:
    import psutil

    from tests.support.forked import Forked

__all__ = ["ServerProcess", "free_port", "serve", "started"]

forked: "type[Forked] | None" = None
"""What starts plain servers sooner; set by tests alone, since benchmarks measure the real start."""

# Of a machine that is busy with other things.
_START_TIMEOUT_S = 600
_STOP_TIMEOUT_S = 600

# Characters of its log, of which the last tell most.
_SHOWN = 10_000


@dataclass
class ServerProcess:
    """A running `python -m server`."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path
    trust: ssl.SSLContext | None = None
    seconds_to_ready: float = 0

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http{'s' if self.trust else ''}://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it has written so far."""
        return self.log_file.read_text(encoding="utf-8")

    def cpu_s(self) -> float:
        """CPU seconds that it and its processes have used, those that have ended too."""
        # Only here: `benchmarks.latency` runs where nothing but the server is installed.
        import psutil

        first = psutil.Process(self.process.pid)
        times = [one.cpu_times() for one in (first, *first.children(recursive=True))]
        return sum(sum(one[:4]) for one in times)

    def children(self, module: str) -> "list[psutil.Process]":
        """Its processes that run this module."""
        import psutil

        found = []
        for child in psutil.Process(self.process.pid).children():
            # One that a test has killed may vanish meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in child.cmdline():
                    found.append(child)
        return found

    def terminate(self) -> None:
        """Ask it to drain and stop (SIGTERM)."""
        self.process.send_signal(signal.SIGTERM)

    def kill_and_start_again(self) -> None:
        """Kill it, and start another on its port; that is not ready yet."""
        self.process.kill()
        self.wait()
        self.process = subprocess.Popen(
            self.process.args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> int:
        """Its exit code, once it is over."""
        return self.process.wait(_STOP_TIMEOUT_S)


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    while True:
        # Below those that the system gives to clients, who would take it before it is used.
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def serve(
    *flags: str,
    environment: dict[str, str] | None = None,
    command: Sequence[str] = ("-m", "server"),
    trust: ssl.SSLContext | None = None,
    folder: Path = ROOT,
) -> Iterator[ServerProcess]:
    """A server with these flags, ready; killed in the end if it still runs.

    Args:
        flags: of `python -m server`; the port is chosen here.
        environment: variables beside those of this process.
        command: what Python runs.
        trust: what its certificate is held against, if the flags give it one.
        folder: the working directory, which holds the code that Python runs.

    Raises:
        RuntimeError: it ended, or was not ready in time; holds its output.
    """
    port = free_port()
    arguments = [*command, "--port", str(port), *flags]
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        began = time.perf_counter()
        with started(arguments, output, environment, folder) as process:
            server = ServerProcess(process, port, Path(output.name), trust)
            try:
                _wait_until_ready(server)
                server.seconds_to_ready = time.perf_counter() - began
                yield server
            except Exception:
                # What went wrong in the server is gone with its log.
                sys.stderr.write(server.log()[-_SHOWN:])
                raise
            finally:
                # A test may have started another in its place.
                if server.process.poll() is None:
                    server.process.kill()
                server.process.wait()


def started(
    arguments: Sequence[str],
    output: IO[bytes],
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
) -> subprocess.Popen[bytes]:
    """Python with these arguments; in tests forked, if it is a module with no variables of its own.

    Args:
        arguments: behind the interpreter.
        output: the file of all that it writes.
        environment: variables beside those of this process.
        folder: the working directory.
    """
    command = [sys.executable, *arguments]
    env = {**os.environ, **(environment or {})}
    if forked is not None and arguments[0] == "-m" and environment is None and folder == ROOT:
        return forked(command, env=env, stdout=output)
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)


def _wait_until_ready(server: ServerProcess) -> None:
    give_up = time.perf_counter() + _START_TIMEOUT_S
    ready = f"{server.url}/health/ready"
    while time.perf_counter() < give_up and server.process.poll() is None:
        try:
            with urllib.request.urlopen(ready, timeout=5, context=server.trust):
                return
        except OSError:  # refused, not ready, or no answer in time
            # Each question takes the time of a core from the start that it waits for.
            time.sleep(0.03)
    raise RuntimeError(f"The server is not ready, its output:\n{server.log()}")
