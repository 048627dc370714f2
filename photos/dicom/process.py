"""Runs the processes that read and write DICOM: each object in one of its own.

As AVIF and HEIC are (`photos.heif`), with limits that the system keeps. The server's own process
never parses DICOM: a header can unpack to gigabytes, and holds a patient's name. It costs half a
second of CPU an object, most of it to load pydicom.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from photos import structure

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

# Seconds of CPU, and for a machine that is busy. Loading takes half a second, 24 megapixels of
# JPEG take four: they are decoded whole.
_MAX_CPU_S = 30
_MAX_S = 120

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
    """A process, and the pipes to and from it."""

    def __init__(self, started: "subprocess.Popen[bytes]") -> None:
        assert started.stdin is not None and started.stdout is not None
        self._started = started
        self._input: IO[bytes] = started.stdin
        self._output: IO[bytes] = started.stdout

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

    def _ended(self) -> None:
        """Raise why the process ended early."""
        self._started.kill()
        code = self._started.wait()
        if code == -signal.SIGXCPU:
            raise structure.TakesTooLongError
        if code == _NO_MEMORY:
            raise MemoryError
        raise ValueError(f"the process ended with {code}")


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[_Process]:
    """Run a module's `main` in a process that ends with the block, or after `_MAX_S`."""
    # In a session of its own: what is typed at the server's terminal is not for it. One thread is
    # all that it uses, and each of OpenBLAS's takes memory.
    started = subprocess.Popen(
        [sys.executable, "-I", "-c", _START, _ROOT, module, *arguments, str(_MAX_CPU_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        started.kill()

    clock = threading.Timer(_MAX_S, end)
    clock.start()
    try:
        yield _Process(started)
    except ValueError as error:
        if is_late.is_set():
            raise structure.TakesTooLongError from error
        raise
    finally:
        clock.cancel()
        started.kill()
        # Its pipes may hold what it did not read.
        with contextlib.suppress(BrokenPipeError):
            started.communicate()
