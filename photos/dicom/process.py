"""Runs the processes that read and write DICOM: each object in one of its own.

The server's own process never parses DICOM: a header can unpack to gigabytes, and holds a patient's
name. `photos.processes` says how such processes are run.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from photos.processes import parent

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
_MAX_S = parent.MAX_S

_START = parent.START

_DECODER = Path(__file__).with_name("decoder.py")
_WRITER = Path(__file__).with_name("writer.py")


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
    _process: parent.Process

    def decode(self, size: int) -> NDArray[np.uint8]:
        """The picture by area average, uint8 [size, size, 3] in RGB.

        Raises:
            RefusedError: the pixels are stored in a way that is not read.
            ValueError: they do not decode.
            MemoryError, structure.TakesTooLongError: they take too much of either.
        """
        self._process.send(b"\n")
        _heard(self._process)
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
    with _running(_DECODER, size, frame or 0) as process:
        process.give(data)
        told = _heard(process)
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
    with _running(_WRITER) as process:
        process.give(data, json.dumps(said).encode(), *pixels)
        sizes = [int(size) for size in _heard(process)["sizes"]]
        content = process.rest(sum(sizes))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [content[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _running(file: Path, *arguments: int) -> contextlib.AbstractContextManager[parent.Process]:
    return parent.running(file, *arguments, _MAX_CPU_S, max_s=_MAX_S, start=_START)


def _heard(process: parent.Process) -> dict[str, Any]:
    """The next line that the process says; raises what it refuses."""
    said = process.hear()
    if "refused" in said:
        raise RefusedError(str(said["refused"]), is_kind=bool(said["is_kind"]))
    return said
