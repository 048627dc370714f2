"""AVIF and HEIC, which phones store: their header, and a process that decodes them.

Both are items in the boxes of an ISO base media file. Their decoders are large and written in C and
C++, and the picture that is coded can be larger than the header says. So the header is read here,
in a bounded number of steps, and each photo is decoded by a process of its own (`heif_decoder.py`),
whose memory and time the system bounds (`photos.processes`). If it crashes, its photo is refused
and nothing else notices.

AVIF is decoded by Pillow itself, HEIC by pillow-heif (requirements-heif.txt).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from photos import structure
from photos.processes import parent

__all__ = ["FORMATS", "Header", "decode", "header", "missing"]

FORMATS = ("AVIF", "HEIC")
"""As `photos.formats.foreign` names them."""

# Boxes, properties and items. A photo of 64 megapixels in tiles of 256x256 has 1,000 items.
_MAX_STEPS = 30_000

# Bytes of memory for each pixel, and for anything else, beyond those that Python has taken. The
# planes, their RGB, Pillow's copy, a turned one and one over white take 20 a pixel.
_PIXEL_BYTES = 32
_OTHER_BYTES = 256 << 20

# Seconds of CPU, as for other formats (`photos.structure`).
_MAX_CPU_S = 10

_DECODER = Path(__file__).with_name("heif_decoder.py")

# Quarter turns to the left (`irot`) and what is mirrored then (`imir`: 0 exchanges top and bottom,
# 1 left and right) -> EXIF's orientation (ISO/IEC 23008-12, 6.5.10 and 6.5.12).
_ORIENTATIONS = {
    (0, None): 1,
    (1, None): 8,
    (2, None): 3,
    (3, None): 6,
    (0, 0): 4,
    (1, 0): 5,
    (2, 0): 2,
    (3, 0): 7,
    (0, 1): 2,
    (1, 1): 7,
    (2, 1): 4,
    (3, 1): 5,
}


@dataclass(frozen=True)
class Header:
    """What a file says of its picture, before anything is decoded."""

    width: int
    """Of the stored picture, before it is turned; pixels."""
    height: int
    every: tuple[tuple[int, int], ...]
    """Width and height of every picture in the file, be it a tile, a preview or a mask."""
    orientation: int
    """What turns the stored picture upright, in EXIF's numbers. EXIF's own is not asked: in these
    files it is a copy for information."""

    @property
    def most_pixels(self) -> int:
        """Pixels of the largest picture in the file."""
        return max(map(math.prod, self.every))


@cache
def missing(name: str) -> str | None:
    """What to tell the sender of a file whose decoder is not installed; None if it is."""
    if name == "AVIF":
        if find_spec("PIL._avif"):
            return None
        needed, way = "a Pillow that is built with it", ""
    else:
        if find_spec("pillow_heif"):
            return None
        needed = "pip install -r requirements-heif.txt"
        way = " An iPhone stores JPEG with Settings, Camera, Formats, Most Compatible."
    return (
        f"This is a file of the format {name}, which this server has no decoder for. Whoever runs"
        f" it can add one ({needed}); or save the photo as JPEG or PNG and send that.{way}"
    )


def header(data: bytes) -> Header | None:
    """Read the header of the still picture; None if there is none, or it is damaged.

    Raises:
        structure.OddError: it has more parts than any photo.
    """
    steps = _Steps()
    try:
        return _header(data, steps)
    except (struct.error, IndexError):
        return None


class _Steps:
    """Bounds the walk through a file."""

    def __init__(self) -> None:
        self._left = _MAX_STEPS

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise structure.OddError(f"more than {_MAX_STEPS} boxes, items or properties")


def _boxes(data: bytes, start: int, end: int, steps: _Steps) -> Iterator[tuple[bytes, int, int]]:
    """The boxes between two offsets: kind, where the content begins, and where it ends."""
    while start + 8 <= end:
        steps.take()
        size, kind = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = end if size == 0 else start + size
        if not body <= stop <= end:
            return
        yield kind, body, stop
        start = stop


def _header(data: bytes, steps: _Steps) -> Header | None:
    found = next((box for box in _boxes(data, 0, len(data), steps) if box[0] == b"meta"), None)
    if found is None:
        return None
    _, start, end = found
    primary: int | None = None
    properties: list[tuple[bytes, int, int]] = []
    used: dict[int, list[int]] = {}
    for kind, body, stop in _boxes(data, start + 4, end, steps):
        if kind == b"pitm":
            (primary,) = struct.unpack_from(">I" if data[body] else ">H", data, body + 4)
        elif kind == b"iprp":
            for inner, at, until in _boxes(data, body, stop, steps):
                if inner == b"ipco":
                    properties += _boxes(data, at, until, steps)
                elif inner == b"ipma":
                    _associate(data, at, used, steps)
    of_primary = [
        properties[index - 1]
        for index in used.get(-1 if primary is None else primary, ())
        if 0 < index <= len(properties)
    ]
    own = _sizes(data, of_primary)
    if not own:
        return None
    turns = next((data[at] & 3 for kind, at, _ in of_primary if kind == b"irot"), 0)
    mirror = next((data[at] & 1 for kind, at, _ in of_primary if kind == b"imir"), None)
    return Header(*own[0], tuple(_sizes(data, properties)), _ORIENTATIONS[turns, mirror])


def _sizes(data: bytes, properties: list[tuple[bytes, int, int]]) -> list[tuple[int, int]]:
    """Width and height by the properties that have them (`ispe`)."""
    return [
        struct.unpack_from(">II", data, at + 4) for kind, at, _ in properties if kind == b"ispe"
    ]


def _associate(data: bytes, at: int, used: dict[int, list[int]], steps: _Steps) -> None:
    """Read which properties each item has (`ipma`)."""
    item_code = ">I" if data[at] else ">H"
    is_wide = data[at + 3] & 1
    (items,) = struct.unpack_from(">I", data, at + 4)
    at += 8
    for _ in range(items):
        steps.take()
        (item,) = struct.unpack_from(item_code, data, at)
        at += struct.calcsize(item_code)
        count = data[at]
        at += 1
        for _ in range(count):
            steps.take()
            (index,) = struct.unpack_from(">H" if is_wide else ">B", data, at)
            at += 2 if is_wide else 1
            # The highest bit says that a reader has to know the property.
            used.setdefault(item, []).append(index & (0x7FFF if is_wide else 0x7F))


def decode(name: str, data: bytes, size: int, told: Header) -> tuple[NDArray[np.uint8], int, int]:
    """Decode in a process of its own.

    Args:
        name: one of `FORMATS`.
        data: the file.
        size: side of the result, pixels.
        told: its header.

    Returns:
        The upright picture by area average, uint8 [size, size, 3] in RGB, and its width and height.

    Raises:
        ValueError: it does not decode.
        MemoryError, structure.TakesTooLongError: it takes too much of either.
    """
    memory = _OTHER_BYTES + _PIXEL_BYTES * told.most_pixels
    arguments = (name, size, told.orientation, memory, _MAX_CPU_S)
    with parent.running(_DECODER, *arguments) as process:
        process.give(data)
        content = process.rest(8 + 3 * size * size)
    width, height = struct.unpack_from("<II", content)
    return np.frombuffer(content, np.uint8, offset=8).reshape(size, size, 3), width, height
