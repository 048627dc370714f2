"""Runs a process for each file that the server's own process does not parse.

The decoders of such files are large, and native in part. A header can unpack to gigabytes, and a
DICOM object's holds a patient's name. So the system bounds what a process takes, and if it crashes,
its file is refused and nothing else notices.

On Linux the processes are forked from one that has loaded the decoders
(`photos.processes.template`). It starts with the first file. Elsewhere each loads its decoder
itself, since forking without starting anew is not safe with all of a system's own libraries there.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from photos import structure
from photos.processes.child import NO_MEMORY
from photos.processes.template import CODE, FORKED, NO_ROOM

if TYPE_CHECKING:
    _Popen = subprocess.Popen[bytes]

__all__ = ["MAX_S", "START", "Process", "close", "running"]

MAX_S = 120
"""Seconds that a process has, on a machine that is busy."""

# Seconds in which the template ends a process, on a machine that is busy, and itself at the exit.
_END_S = 60
_EXIT_S = 5

# By name: not every system has all of them.
_CRASHES = {
    getattr(signal, name, None) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE")
}

# Characters of what a process may say.
_MAX_SAID = 10_000

# Without the project's tests and tools in its path, and whatever else PYTHONPATH names.
START = (
    "import sys; sys.path.append(sys.argv.pop(1)); from photos.processes.child import main_of;"
    " sys.exit(main_of(sys.argv.pop(1))())"
)
"""Python code that loads a file and runs its `main`; its arguments are `_ROOT`, the file, and those
of the file."""

_ROOT = str(Path(__file__).parents[2])
_TEMPLATE = Path(__file__).with_name("template.py")

_REASONS: dict[int, type[Exception]] = {NO_MEMORY: MemoryError}
if sys.platform != "win32":
    # The system kills what takes the last of its memory.
    _REASONS |= {-signal.SIGKILL: MemoryError, -signal.SIGXCPU: structure.TakesTooLongError}


class Process:
    """A process, and the pipes to and from it.

    Args:
        to, of: its input and its output.
        kill: ends it if it has not ended.
        wait: waits for its end, and gives its exit code.
    """

    def __init__(
        self,
        to: IO[bytes],
        of: IO[bytes],
        kill: Callable[[], None],
        wait: Callable[[], int],
    ) -> None:
        self._input = to
        self._output = of
        self._kill = kill
        self._wait = wait

    def send(self, *parts: bytes) -> None:
        """Write these bytes; one that has ended takes none, and `hear` tells why."""
        with contextlib.suppress(BrokenPipeError):
            for part in parts:
                self._input.write(part)
            self._input.flush()

    def give(self, *pieces: bytes) -> None:
        """Write these pieces as `photos.processes.child.taken` reads them; see `send`."""
        for piece in pieces:
            self.send(len(piece).to_bytes(8, "little"), piece)

    def hear(self) -> dict[str, Any]:
        """The next line that the process says, a JSON document.

        Raises:
            ValueError, MemoryError, structure.TakesTooLongError: it ended without one.
        """
        line = self._output.readline(_MAX_SAID)
        if not line.endswith(b"\n"):
            raise _reason(self.stop(), says_too_much=len(line) == _MAX_SAID)
        said: dict[str, Any] = json.loads(line)
        return said

    def rest(self, size: int) -> bytes:
        """All that the process still writes, which has to be so many bytes; raises as `hear`.

        One that crashes after it has written them is not trusted.
        """
        content = self._output.read(size + 1)
        code = self.stop()
        if code or len(content) != size:
            raise _reason(code, says_too_much=len(content) > size)
        return content

    def stop(self) -> int:
        """End it, whatever it does, if it has not ended; from any thread. Return its exit code."""
        self._kill()
        return self._wait()

    def end(self) -> None:
        """End it, and close its pipes."""
        self._kill()
        for pipe in (self._input, self._output):
            # It may hold what the process did not read.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._wait()


def _reason(code: int, *, says_too_much: bool = False) -> Exception:
    """What a process that ended early with this code had too much or too little of.

    One that says too much may have been killed for that, so its code says nothing.
    """
    if says_too_much:
        return ValueError("the process says more than it should")
    if code in _REASONS:
        return _REASONS[code]()
    return ValueError(f"the process ended with {code}")


@contextlib.contextmanager
def running(
    file: Path, *arguments: object, max_s: float = MAX_S, start: str = START
) -> Iterator[Process]:
    """Run a Python file's `main` in a process that ends with the block.

    Args:
        file: it may import what it needs of `photos`, and is loaded once for many processes.
        arguments: those of the process, as text.
        max_s: seconds after which it is ended.
        start: as `START`.

    Raises:
        ValueError: it crashed, or does not start.
        MemoryError, structure.TakesTooLongError: it took too much of either.
    """
    given = list(map(str, arguments))
    if sys.platform == "linux":
        process = _template(start).forked(file, given, max_s)
    else:
        process = _started_anew(start, file, given)
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        process.stop()

    clock = threading.Timer(max_s, end)
    try:
        clock.start()
        yield process
    except (ValueError, MemoryError) as error:
        if is_late.is_set():
            raise structure.TakesTooLongError from error
        raise
    finally:
        clock.cancel()
        process.end()


def _started(start: str, file: Path, arguments: Sequence[str], **files: Any) -> "_Popen":
    # In a session of its own: what is typed at the server's terminal is not for it. One thread is
    # all that it uses, and each of OpenBLAS's takes memory.
    return subprocess.Popen(
        [sys.executable, "-I", "-c", start, _ROOT, str(file), *arguments],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
        **files,
    )


def _started_anew(start: str, file: Path, arguments: Sequence[str]) -> Process:
    """A process that loads its decoder itself."""
    started = _started(start, file, arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdin is not None and started.stdout is not None
    return Process(started.stdin, started.stdout, started.kill, started.wait)


class _Template:
    """The process that others are forked from; see `photos.processes.template`.

    Args:
        start: the code that starts it.
    """

    def __init__(self, start: str) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._running: _Popen | None = None
        self._ask: socket.socket
        self._is_worn = False
        self._former: list[_Popen] = []
        """They end once what they forked has ended."""

    def forked(self, file: Path, arguments: Sequence[str], max_s: float) -> Process:
        """A new process, which runs a file's `main`.

        Raises:
            ValueError: the template cannot be started.
            MemoryError: there is not enough of it, or of files, for a process more.
            structure.TakesTooLongError: the template is not there in time.
        """
        if not self._lock.acquire(timeout=max_s):
            raise structure.TakesTooLongError
        try:
            was_there = self._lives()
            process = self._forked(file, arguments, max_s)
            if process is None and was_there:
                # It was killed for its memory, perhaps, or by a person.
                process = self._forked(file, arguments, max_s)
            if process is None:
                assert self._running is not None
                raise _reason(self._running.wait())
            return process
        finally:
            self._lock.release()

    def wear(self) -> None:
        """Let the next process come from a new template.

        All that come from one have the same addresses in memory, which crashes can be used to find.
        """
        self._is_worn = True

    def close(self) -> None:
        """End it, and with it all that were forked from it."""
        self._drop()
        for former in self._former:
            try:
                former.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                former.kill()
                former.wait()

    def _lives(self) -> bool:
        return self._running is not None and self._running.poll() is None and not self._is_worn

    def _drop(self) -> None:
        if self._running is not None:
            self._ask.close()
            self._former.append(self._running)
            self._running = None
        self._is_worn = False
        self._former = [one for one in self._former if one.poll() is None]

    def _begin(self) -> None:
        self._drop()
        ask, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ask)
            streams: dict[str, Any] = {"stdin": theirs, "stdout": subprocess.DEVNULL}
            self._running = _started(self._start, _TEMPLATE, (), **streams)
            undo.pop_all()
        self._ask = ask

    def _forked(self, file: Path, arguments: Sequence[str], max_s: float) -> Process | None:
        """A new process; None if the template has died."""
        if not self._lives():
            self._begin()
        assert self._running is not None
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            taken, to = _pipe(theirs, ours)
            given, of = _pipe(theirs, ours, is_output=True)
            told, tells = socket.socketpair()
            ours.enter_context(told)
            theirs.enter_context(tells)
            told.settimeout(max_s)
            message = json.dumps({"file": str(file), "arguments": arguments}).encode()
            said = b""
            try:
                socket.send_fds(self._ask, [message], [tells.fileno(), taken, given])
                # Else this process could not be heard to end.
                theirs.close()
                said = told.recv(len(FORKED))
            except ConnectionError:
                pass
            except TimeoutError as error:
                self._running.kill()
                self._running.wait()
                raise structure.TakesTooLongError from error
            if said == NO_ROOM:
                raise MemoryError
            if said != FORKED:
                # It may take a moment to die.
                self._running.kill()
                self._running.wait()
                return None
            ours.pop_all()
        end = _End(told, self._running, self.wear)
        return Process(to, of, end.hasten, end.wait)


def _pipe(
    theirs: contextlib.ExitStack, ours: contextlib.ExitStack, *, is_output: bool = False
) -> tuple[int, IO[bytes]]:
    """A pipe: the end that the new process gets, and the other one."""
    read, write = os.pipe()
    end, other = (write, read) if is_output else (read, write)
    theirs.callback(os.close, end)
    return end, ours.enter_context(os.fdopen(other, "rb" if is_output else "wb"))


class _End:
    """The end of a process that was forked, as its template tells of it.

    Args:
        told: by the template.
        template: the process was forked from it.
        crashed: called if the process has crashed.
    """

    def __init__(
        self, told: socket.socket, template: "_Popen", crashed: Callable[[], None]
    ) -> None:
        self._told = told
        self._template = template
        self._crashed = crashed
        self._lock = threading.Lock()
        self._code: int | None = None

    def hasten(self) -> None:
        with contextlib.suppress(OSError):
            self._told.shutdown(socket.SHUT_WR)

    def wait(self) -> int:
        with self._lock:
            if self._code is None:
                self._code = self._hear()
                self._told.close()
                if -self._code in _CRASHES:
                    self._crashed()
            return self._code

    def _hear(self) -> int:
        self._told.settimeout(_END_S)
        try:
            said = self._told.recv(CODE.size)
        except TimeoutError:
            # It was stopped, perhaps. What it has forked ends with it.
            self._template.kill()
            said = b""
        return CODE.unpack(said)[0] if said else -signal.SIGKILL


_templates: dict[str, _Template] = {}
"""By the code that starts them, which tests replace."""
_templates_lock = threading.Lock()


def _template(start: str) -> _Template:
    with _templates_lock:
        if start not in _templates:
            _templates[start] = _Template(start)
        return _templates[start]


def close() -> None:
    """End what processes are forked from, and with it all of them. Later ones come from another."""
    with _templates_lock:
        for template in _templates.values():
            template.close()


# Else it would be reported as left behind.
atexit.register(close)
