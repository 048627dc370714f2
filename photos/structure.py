"""Bounds the work that a photo's bytes ask of a decoder, before the decoder sees them.

A few bytes can ask for much work: scans of a JPEG that each pass over the whole picture, a million
empty strips, chunks or segments, run lengths that paint nothing. A thread that decodes cannot be
stopped. So `check` first walks the file's structure, in a bounded number of steps, and refuses what
no camera and no program writes. The walk takes some microseconds. `metered` stops most of the rest:
decoders ask it for the next piece of the file, and get none when they have taken too long.

It is hand-written because Pillow has no such limits. Processes that can be killed would bound all
tricks, but cost every photo two copies of its pixels, and memory for each process.
"""

import struct
import time
from io import BytesIO
from typing import Literal

import numpy as np

__all__ = ["OddError", "TakesTooLongError", "check", "header_is_read", "is_modest_exif", "metered"]

# Segments, chunks or fill bytes. A file of 64 MB with its pixels in pieces of 4 KB has 16,000.
_MAX_PIECES = 30_000

# Bytes of a JPEG outside of all segments: Pillow looks at each.
_MAX_JUNK_BYTES = 1 << 16

# All tables of a JPEG take 520 bytes. Each of these segments costs Pillow up to 5 ms.
_MAX_TABLE_SEGMENTS = 64

# Pieces of metadata that are parsed or unpacked: each costs up to 5 ms.
_MAX_PARSED_PIECES = 64

# Tags of one directory (of TIFF, also within EXIF), and numbers in all of its tags.
_MAX_TAGS = 2_000
_MAX_NUMBERS = 120_000

# EXIF of up to this length, which is what one segment of a JPEG holds, costs 20 ms at most.
_ANY_EXIF_BYTES = 1 << 16

# Strips or tiles of a TIFF: 64 megapixels in three planes have so many of 64x64 pixels.
_MAX_STRIPS = 50_000

# A pass over a JPEG's coefficients costs about a nanosecond a pixel, with arithmetic coding five.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 800_000_000
_ARITHMETIC = 5

# Pillow paints runs in Python: each takes a microsecond, and some take one for each pixel.
_MAX_RUN_BYTES = 1_000_000
_MAX_RUN_PIXELS = 2_000_000

# Seconds of CPU for the header, which takes any sound photo less than 10 ms, and for the whole
# photo. The slowest that passes `check`, a PNG of 64 megapixels with transparency, takes 4.
_MAX_HEADER_S = 1.0
_MAX_PHOTO_S = 10.0

# Bytes that Pillow's decoders read at a time.
_SHORT_BYTES = 1 << 16

# Asking the clock takes longer than most reads.
_READS_A_LOOK = 32

_TYPE_BYTES = dict(zip(range(1, 14), (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), strict=True)) | {
    16: 8,
    17: 8,
    18: 8,
}
_BYTE_STRINGS = (1, 2, 7)
_SUB_DIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability
_EXIF_PREFIX = b"Exif\0\0"


class TakesTooLongError(Exception):
    """Decoding has used up its time."""


class _MeteredBytes(BytesIO):
    """A file in memory that refuses a read once the thread has spent too long on it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._until = time.thread_time() + _MAX_HEADER_S
        self._reads = 0

    def header_is_read(self) -> None:
        """The header is read; from now on the limit for the whole photo holds."""
        self._until += _MAX_PHOTO_S - _MAX_HEADER_S

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes.

        Raises:
            TakesTooLongError: the thread has used up the time of this photo.
        """
        self._reads += 1
        if not self._reads % _READS_A_LOOK and time.thread_time() > self._until:
            raise TakesTooLongError
        return super().read(size)


def metered(data: bytes) -> BytesIO:
    """The file for its decoder. A short file is read in one piece and is cheap to parse."""
    return BytesIO(data) if len(data) <= _SHORT_BYTES else _MeteredBytes(data)


def header_is_read(file: BytesIO) -> None:
    """Tell a file that `metered` gave that its header is read: now the photo's limit holds."""
    if isinstance(file, _MeteredBytes):
        file.header_is_read()


class OddError(Exception):
    """The file's structure is refused; the message says which part, as in "too many …"."""


def check(name: str, data: bytes, jpeg_scans: int = 0) -> str | None:
    """What the file has too much of, as a noun phrase; None if it is sound.

    A file that ends too early, or whose lengths make no sense, is left to its decoder.

    Args:
        name: format, by Pillow's names.
        jpeg_scans: how many scans there are, if it is a JPEG.
    """
    try:
        match name:
            case "JPEG":
                _check_jpeg(data, jpeg_scans)
            case "PNG":
                _check_png(data)
            case "WEBP":
                _check_webp(data)
            case "BMP":
                _check_bmp(data)
            case "TIFF":
                _check_tiff(data)
    except OddError as odd:
        return str(odd)
    except (struct.error, IndexError):
        return None
    return None


def is_modest_exif(exif: bytes) -> bool:
    """Whether a block of EXIF can be parsed at little cost."""
    try:
        _check_exif(exif)
    except OddError:
        return False
    except (struct.error, IndexError):
        # Damaged EXIF costs nothing.
        return True
    return True


def _check_jpeg(data: bytes, scans: int) -> None:
    if scans <= 1 and len(data) <= _SHORT_BYTES:
        return  # So few segments cost nothing: the walk is not needed.
    at, junk, tables, parsed, pixels, weight = 2, 0, 0, 0, 0, 1
    exif: list[bytes] = []
    for _ in range(_MAX_PIECES):
        marked = data.find(0xFF, at)
        if marked < 0:
            return
        junk += marked - at
        if junk > _MAX_JUNK_BYTES:
            raise OddError("bytes that belong to no segment")
        marker = data[marked + 1]
        at = marked + (1 if marker == 0xFF else 2)
        if marker == 0xDA:
            break
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or 0xF0 <= marker != 0xFE:
            continue  # fill bytes, and markers that stand alone
        body = at + 2
        at += max(2, int.from_bytes(data[at:body], "big"))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, body + 1)
            pixels = max(pixels, width * height)
            weight = _ARITHMETIC if marker >= 0xC9 else 1
        elif marker == 0xDB:
            tables += 1
        elif marker == 0xE1 and data.startswith(_EXIF_PREFIX, body):
            exif.append(data[body + (len(_EXIF_PREFIX) if exif else 0) : at])
        elif marker == 0xED:
            parsed += 1
        if max(tables, parsed, len(exif)) > _MAX_TABLE_SEGMENTS:
            raise OddError("too many segments of one kind")
    else:
        raise OddError(f"more than {_MAX_PIECES} segments or fill bytes")
    if exif:
        _check_exif(b"".join(exif))
    if scans > _MAX_SCANS:
        raise OddError(f"more than {_MAX_SCANS} scans")
    if scans > 1 and scans * pixels * weight > _MAX_SCANNED_PIXELS:
        raise OddError(f"{scans} scans, too many for its size")


def _check_png(data: bytes) -> None:
    at, packed = 8, 0
    for _ in range(_MAX_PIECES):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        packed += kind in (b"zTXt", b"iTXt", b"iCCP")
        if packed > _MAX_PARSED_PIECES:
            raise OddError(f"more than {_MAX_PARSED_PIECES} packed texts or profiles")
        at += 12 + length
    raise OddError(f"more than {_MAX_PIECES} chunks")


def _check_webp(data: bytes) -> None:
    at = 12
    for _ in range(_MAX_PIECES):
        (length,) = struct.unpack_from("<4xI", data, at)
        at += 8 + length + length % 2
    raise OddError(f"more than {_MAX_PIECES} chunks")


def _check_bmp(data: bytes) -> None:
    (header,) = struct.unpack_from("<I", data, 14)
    if header < 40:
        return
    width, height = struct.unpack_from("<ii", data, 18)
    (compression,) = struct.unpack_from("<I", data, 30)
    if compression in (1, 2) and (
        len(data) > _MAX_RUN_BYTES or abs(width * height) > _MAX_RUN_PIXELS
    ):
        raise OddError("run-length coding of so large a picture")


def _check_exif(exif: bytes) -> None:
    if len(exif) <= _ANY_EXIF_BYTES:
        return
    start = 0
    while exif.startswith(_EXIF_PREFIX, start):
        # For each of them Pillow copies the rest of the file.
        start += len(_EXIF_PREFIX)
        if start > 4 * len(_EXIF_PREFIX):
            raise OddError("repeated EXIF headers")
    _check_first_directory(exif[start:])


def _check_tiff(data: bytes) -> None:
    _check_first_directory(data).check_strips()


class _Directory:
    """The tags of a TIFF directory, none of them unpacked."""

    def __init__(self, data: bytes, at: int, *, order: str, big: bool) -> None:
        self._data, self._order = data, order
        self._tags: dict[int, tuple[int, int, int]] = {}
        (tags,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
        if tags > _MAX_TAGS:
            raise OddError(f"more than {_MAX_TAGS} tags")
        numbers, inline = 0, 8 if big else 4
        at += inline if big else 2
        for _ in range(tags):
            tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, at)
            at += 12 if big else 8
            size = count * _TYPE_BYTES.get(kind, 0)
            # All readers skip a value that claims to be longer than the file.
            if 0 < size <= len(data):
                where = at
                if size > inline:
                    (where,) = struct.unpack_from(order + ("Q" if big else "I"), data, at)
                self._tags.setdefault(tag, (kind, count, where))
                numbers += 0 if kind in _BYTE_STRINGS else count
            at += inline
        if numbers > _MAX_NUMBERS:
            raise OddError(f"more than {_MAX_NUMBERS} numbers in its tags")

    def numbers(self, *tags: int) -> list[int]:
        """The numbers of the first of these tags that is there."""
        for tag in tags:
            if tag in self._tags:
                kind, count, at = self._tags[tag]
                size = _TYPE_BYTES[kind]
                if kind in (1, 3, 4, 13, 16) and at + size * count <= len(self._data):
                    if count == 1:
                        order: Literal["little", "big"] = "little" if self._order == "<" else "big"
                        return [int.from_bytes(self._data[at : at + size], order)]
                    values = np.frombuffer(self._data, f"{self._order}u{size}", count, at)
                    return [int(value) for value in values]
        return []

    def number(self, tag: int, default: int) -> int:
        return next(iter(self.numbers(tag)), default)

    def check_strips(self) -> None:
        width, height = self.number(256, 0), self.number(257, 0)
        planes = self.number(277, 1) if self.number(284, 1) == 2 else 1
        if 322 in self._tags or 324 in self._tags:
            across, down = max(1, self.number(322, 1)), max(1, self.number(323, 1))
        else:
            across, down = width, max(1, min(height, self.number(278, height)))
        needed = -(-width // max(1, across)) * -(-height // down) * planes
        given = max(self._tags.get(tag, (0, 0))[1] for tag in (273, 279, 324, 325))
        if max(given, needed) > _MAX_STRIPS:
            raise OddError(f"more than {_MAX_STRIPS} strips or tiles")
        area = across * down
        # With room for tiles that reach over the edge.
        if needed * area > planes * (4 * width * height + (1 << 22)):
            raise OddError("tiles so much larger than the picture")
        compression = self.number(259, 1)
        if compression == 1:
            return
        size = len(self._data)
        starts, lengths = self.numbers(273, 324), self.numbers(279, 325)
        if sum(min(length, size) for length in lengths) > 4 * size + (1 << 16):
            raise OddError("strips that lie over each other")
        if compression == 7:
            scans = sum(
                self._data.count(b"\xff\xda", start, start + length)
                for start, length in zip(starts, lengths, strict=False)
            )
            if scans > len(starts) and scans * area > _MAX_SCANNED_PIXELS:
                raise OddError(f"{scans} JPEG scans, too many for its size")


def _check_first_directory(data: bytes) -> _Directory:
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] == b"+\0"
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    directory = _Directory(data, at, order=order, big=big)
    for tag in _SUB_DIRECTORIES:
        _check_sub_directory(data, directory, tag, order=order, big=big)
    return directory


def _check_sub_directory(
    data: bytes, parent: _Directory, tag: int, *, order: str, big: bool, depth: int = 2
) -> None:
    at = parent.number(tag, 0)
    if not at or not depth:
        return
    try:
        directory = _Directory(data, at, order=order, big=big)
    except struct.error:
        return
    for inner in _SUB_DIRECTORIES:
        _check_sub_directory(data, directory, inner, order=order, big=big, depth=depth - 1)
