"""A server under test: its environment is made; it is started, watched with all children, stopped.

Children are known by an environment variable that they inherit, however far from the first process.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.client import LOST, at_once
from benchmarks.peers.entrants import Entrant

ROOT = Path(__file__).parents[2]
_ENVIRONMENTS = Path(__file__).parent / ".envs"
_SERVERS = Path(__file__).parent / "servers"
_MARK = "PEER_RUN"
_STARTED_BY = "PEER_STARTED_BY"
# Variables that no server gets. Importing ours sets the second, which would slow a peer.
_OURS = ("PYTHONPATH", "OPENBLAS_NUM_THREADS")
_START_TIMEOUT_S = 90
_INSTALL_TIMEOUT_S = 1200


_folders: set[str] = set()
"""Folders of running servers."""


def end_on_signals() -> None:
    """From now on, SIGTERM and SIGINT end this process with everything that it has started.

    The handler does so itself: uvloop loses an exception that comes out of a handler, or puts
    another in its place, where the signal arrives while a loop starts.
    """
    os.environ[_STARTED_BY] = mine = str(os.getpid())

    def end(number: int, _frame: object) -> None:
        _kill(lambda: _with_variable(_STARTED_BY, mine))
        for folder in _folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def _with_variable(name: str, value: str) -> list[int]:
    """Processes that were started with this environment variable."""
    needle = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_zombie and needle in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _kill(pids_left: Callable[[], list[int]]) -> None:
    """Kill all processes, and those that they have started meanwhile."""
    while pids := pids_left():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Unavailable(Exception):
    """A peer cannot be measured here. The message says why."""


def python_of(entrant: Entrant) -> Path:
    """The interpreter of the server's own environment."""
    return _ENVIRONMENTS / entrant.environment / "bin" / "python"


def prepare(entrant: Entrant) -> None:
    """Make the environment of a peer, unless it exists with the same pins.

    Raises:
        Unavailable: its packages cannot be installed, or a program is missing.
    """
    if entrant.needs and shutil.which(entrant.needs) is None:
        raise Unavailable(f"needs {entrant.needs}, which is not on PATH")
    if entrant.is_ours:
        return
    folder = _ENVIRONMENTS / entrant.environment
    pins, installed = entrant.requirements.read_text(encoding="utf-8"), folder / "installed.txt"
    if installed.exists() and installed.read_text(encoding="utf-8") == pins:
        return
    venv.create(folder, clear=True, with_pip=True)
    command = [str(python_of(entrant)), "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "-r", str(entrant.requirements)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise Unavailable(f"does not install: {lines[-1] if lines else error}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"takes more than {_INSTALL_TIMEOUT_S} s to install") from error
    installed.write_text(pins, encoding="utf-8")


@dataclass
class Running:
    """A server that has answered once, with all the processes that it has started."""

    process: subprocess.Popen[bytes]
    port: int
    mark: str
    log_file: Path
    seconds_to_ready: float = 0
    """Seconds from the start to the first mask."""

    def pids(self) -> list[int]:
        """Ids of all its processes."""
        return _with_variable(_MARK, self.mark)

    def memory_mib(self) -> float:
        """Memory of all its processes, with shared pages counted once (PSS)."""
        total_kib = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total_kib += int(line.split()[1])
        return total_kib / 1024

    def cpu_s(self) -> float:
        """CPU seconds that its present processes have used."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        """Send SIGTERM to the process that was started, as a container's runtime does."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """End all remaining processes, and those that they have started meanwhile."""
        _kill(self.pids)
        self.process.wait()


@contextlib.contextmanager
def running(
    entrant: Entrant,
    python: Path,
    environment: Mapping[str, str],
    stub_ms: float | None,
    photo: bytes,
) -> Iterator[Running]:
    """Start the server, and ask until it answers with a mask. Kill it in the end.

    Args:
        python: the interpreter of a peer.
        environment: variables that the peers' handlers read.
        stub_ms: milliseconds of the stub in the network's place; None is the real network.

    Raises:
        Unavailable: the server ended or gave no mask in time; the message has its last output.
    """
    port = _free_ports()
    network = environment["PEER_NETWORK"] if stub_ms is None else None
    # A visit must not be lost because of files that a server wrote in its last moment.
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        _folders.add(folder)
        log_file = Path(folder) / "output.txt"
        mark = Path(folder).name
        for name in ("files", "tmp"):
            (Path(folder) / name).mkdir()
        variables = {
            **{name: value for name, value in os.environ.items() if name not in _OURS},
            **environment,
            # TorchServe keeps socket and process id there, and would take another's for its own.
            "TMPDIR": str(Path(folder) / "tmp"),
            "PEER_PORT": str(port),
            "PEER_FOLDER": str(Path(folder) / "files"),
            "PEER_DEVICE": str(Path(folder) / "device"),
            _MARK: mark,
        }
        with log_file.open("wb") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                _command(entrant, python, port, network),
                cwd=ROOT if entrant.is_ours else _SERVERS,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Running(process, port, mark, log_file)
        try:
            _wait_until_ready(server, entrant.ask(photo), started)
            yield server
        finally:
            server.stop()
            _folders.discard(folder)


def _command(entrant: Entrant, python: Path, port: int, network: str | None) -> list[str]:
    """What starts the server; `network` is the file of the real one, None is a stub."""
    if not entrant.is_ours:
        return [str(python), str(_SERVERS / entrant.script)]
    module = "benchmarks.peers.slsnet" if network is None else "server"
    command = [sys.executable, "-m", module, "--port", str(port), *entrant.flags]
    return command if network is None else [*command, "--model", network]


def _free_ports() -> int:
    """The first of three free ports in a row, since some servers take so many.

    None is a port that the system gives to clients: the load's own might then be in the way.
    """
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + 3):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def _wait_until_ready(server: Running, request: bytes, started: float) -> None:
    while time.perf_counter() < started + _START_TIMEOUT_S:
        if server.process.poll() is not None:
            raise Unavailable(f"ended with {server.process.returncode}: {_last_lines(server)}")
        try:
            status = at_once(server.port, [request], timeout_s=20)[0].status
        except OSError:
            status = LOST
        if status == 200:
            server.seconds_to_ready = time.perf_counter() - started
            return
        time.sleep(0.02)
    raise Unavailable(f"no mask within {_START_TIMEOUT_S} s: {_last_lines(server)}")


def _last_lines(server: Running) -> str:
    lines = server.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-3:])[-300:]
