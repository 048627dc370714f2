"""Runs the processes that read and write DICOM: each object in one of its own.

As AVIF and HEIC are (`photos.heif`), with limits that the system keeps. The server's own process
never parses DICOM: a header can unpack to gigabytes, and holds a patient's name.

On Linux the processes are forked from one that has loaded the libraries (`photos.dicom.template`).
It starts with the first object. Elsewhere each loads them itself, since forking without starting
anew is not safe with all of a system's own libraries there.
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
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from photos import structure
from photos.dicom.template import CODE, FORKED, NO_ROOM

if TYPE_CHECKING:
    _Popen = subprocess.Popen[bytes]

__all__ = [
    "NAME",
    "Opened",
    "RefusedError",
    "Spacing",
    "is_dicom",
    "missing",
    "opened",
    "written",
]

NAME = "DICOM"
"""The format's name."""

Spacing = tuple[float, float]
"""Millimetres from one pixel's centre to the next: across, down."""

# Seconds of CPU, and for a machine that is busy. 24 megapixels of JPEG take four: they are decoded
# whole.
_MAX_CPU_S = 30
_MAX_S = 120

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
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); from importlib import import_module;"
    " sys.exit(import_module(sys.argv.pop(1)).main())"
)
_ROOT = str(Path(__file__).parents[2])

_NO_MEMORY = 3
"""A process's exit code if memory did not suffice."""


class RefusedError(Exception):
    """The object is sound, or not even that, and is not read; the message says what to send."""

    def __init__(self, message: str, *, is_kind: bool) -> None:
        super().__init__(message)
        self.is_kind = is_kind
        """Whether no object of its kind is read."""


def is_dicom(data: bytes) -> bool:
    """Whether these bytes are a DICOM file (PS3.10, 7.1)."""
    return data[128:132] == b"DICM"


@cache
def missing() -> str | None:
    """What to tell the sender of an object where DICOM is not installed; None if it is."""
    if all(map(find_spec, ("pydicom", "highdicom", "gdcm", "jpeg_ls"))):
        return None
    return (
        "This is a file of the format DICOM, which this server cannot read. Whoever runs it can add"
        " that (pip install -r requirements-dicom.txt, or the extra `dicom`); or save the photo as"
        " JPEG or PNG and send that."
    )


@dataclass(frozen=True)
class Opened:
    """An object whose header is read, and whose pixels are not decoded yet."""

    width: int
    """Pixels."""
    height: int
    spacing: Spacing | None
    """Of its pixels; None if the object does not tell it."""
    _process: "_Process"

    def decode(self, size: int) -> NDArray[np.uint8]:
        """The picture by area average, uint8 [size, size, 3] in RGB.

        Raises:
            RefusedError: the pixels are stored in a way that is not read.
            ValueError: they do not decode.
            MemoryError, structure.TakesTooLongError: they take too much of either.
        """
        self._process.send(b"\n")
        self._process.hear()
        return np.frombuffer(self._process.rest(3 * size * size), np.uint8).reshape(size, size, 3)


@contextlib.contextmanager
def opened(data: bytes, size: int, frame: int | None) -> Iterator[Opened]:
    """Read the header of an object in a process of its own, which decodes when it is asked to.

    Args:
        data: the object.
        size: side of the decoded picture, pixels.
        frame: which one, from 1; None for the only one.

    Raises:
        RefusedError: it is no photo, or it is not known which of its frames is meant.
        ValueError: it does not parse.
        MemoryError, structure.TakesTooLongError: it takes too much of either.
    """
    with _process("photos.dicom.decoder", str(size), str(frame or 0)) as process:
        process.send(len(data).to_bytes(8, "little"), data)
        told = process.hear()
        spacing = told["spacing"]
        yield Opened(
            int(told["columns"]), int(told["rows"]), spacing and (spacing[1], spacing[0]), process
        )


def written(data: bytes, said: dict[str, Any], pixels: Sequence[bytes]) -> list[bytes]:
    """Objects with results that refer to an object, written by a process of its own.

    Args:
        data: the object.
        said: what was found, as `photos.archived` and `photos.dicom.writer` have it.
        pixels: those of `said["pixels"]`, in this order.

    Raises:
        RefusedError, ValueError: nothing can be written that refers to it.
        MemoryError, structure.TakesTooLongError: it takes too much of either.
    """
    with _process("photos.dicom.writer") as process:
        for part in (data, json.dumps(said).encode(), *pixels):
            process.send(len(part).to_bytes(8, "little"), part)
        sizes = [int(size) for size in process.hear()["sizes"]]
        content = process.rest(sum(sizes))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [content[start : start + size] for start, size in zip(starts, sizes, strict=True)]


class _Process:
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

    def hear(self) -> dict[str, Any]:
        """The next line that the process says; raises what it refuses."""
        line = self._output.readline(_MAX_SAID)
        if not line.endswith(b"\n"):
            self._ended()
        said: dict[str, Any] = json.loads(line)
        if "refused" in said:
            raise RefusedError(str(said["refused"]), is_kind=bool(said["is_kind"]))
        return said

    def rest(self, size: int) -> bytes:
        """All that the process still writes, which has to be so many bytes."""
        content = self._output.read(size + 1)
        if len(content) != size:
            self._ended()
        return content

    def _ended(self) -> NoReturn:
        """Raise why the process ended early."""
        raise _reason(self.stop())

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


def _reason(code: int) -> Exception:
    """What a process that ended early with this code had too much or too little of."""
    if code == -signal.SIGXCPU:
        return structure.TakesTooLongError()
    if code == _NO_MEMORY:
        return MemoryError()
    return ValueError(f"the process ended with {code}")


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[_Process]:
    """Run a module's `main` in a process that ends with the block, or after `_MAX_S`."""
    given = (*arguments, str(_MAX_CPU_S))
    if sys.platform == "linux":
        process = _template(_START).forked(module, given)
    else:
        process = _started_anew(module, given)
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        process.stop()

    clock = threading.Timer(_MAX_S, end)
    try:
        clock.start()
        yield process
    except ValueError as error:
        if is_late.is_set():
            raise structure.TakesTooLongError from error
        raise
    finally:
        clock.cancel()
        process.end()


def _start(start: str, module: str, arguments: Sequence[str], **files: Any) -> "_Popen":
    # In a session of its own: what is typed at the server's terminal is not for it. One thread is
    # all that it uses, and each of OpenBLAS's takes memory.
    return subprocess.Popen(
        [sys.executable, "-I", "-c", start, _ROOT, module, *arguments],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
        **files,
    )


def _started_anew(module: str, arguments: Sequence[str]) -> _Process:
    """A process that loads the libraries itself."""
    started = _start(_START, module, arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdin is not None and started.stdout is not None
    return _Process(started.stdin, started.stdout, started.kill, started.wait)


class _Template:
    """The process that others are forked from; see `photos.dicom.template`.

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

    def forked(self, module: str, arguments: Sequence[str]) -> _Process:
        """A new process, which runs a module's `main`.

        Raises:
            ValueError: the template cannot be started.
            MemoryError: there is not enough of it, or of files, for a process more.
            structure.TakesTooLongError: the template is not there in time.
        """
        if not self._lock.acquire(timeout=_MAX_S):
            raise structure.TakesTooLongError
        try:
            was_there = self._lives()
            process = self._forked(module, arguments)
            if process is None and was_there:
                # It was killed for its memory, perhaps, or by a person.
                process = self._forked(module, arguments)
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
            arguments = (self._start, "photos.dicom.template", ())
            self._running = _start(*arguments, stdin=theirs, stdout=subprocess.DEVNULL)
            undo.pop_all()
        self._ask = ask

    def _forked(self, module: str, arguments: Sequence[str]) -> _Process | None:
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
            told.settimeout(_MAX_S)
            message = json.dumps({"module": module, "arguments": arguments}).encode()
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
        return _Process(to, of, end.hasten, end.wait)


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
            # Else it would be reported as left behind.
            atexit.register(_templates[start].close)
        return _templates[start]
