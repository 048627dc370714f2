"""Files of a few kilobytes to megabytes that ask a decoder for minutes, or for gigabytes."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

__all__ = ["attacks"]


def _encoded(size: tuple[int, int], name: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = BytesIO()
    small = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).convert(mode)
    picture.save(buffer, name, **options)
    return buffer.getvalue()


def _with_scans(scans: int, before: bytes, side: int) -> bytes:
    data = _encoded((side, side), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + (before + last) * scans + data[-2:]


def _jpeg(head: bytes) -> bytes:
    data = _encoded((64, 48), "JPEG")
    return data[:2] + head + data[2:]


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(chunks: bytes) -> bytes:
    data = _encoded((64, 48), "PNG")
    return data[:33] + chunks + data[33:]


def _bmp(runs: bytes, size: tuple[int, int], compression: int = 1) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, *size, 1, 8, compression, len(runs), 0, 0, 256, 0)
    palette = b"".join(bytes([value, 0, 255 - value, 0]) for value in range(256))
    start = 14 + len(head) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start) + (head + palette + runs)


def _tiff(
    tags: list[tuple[int, int, int, int | bytes]], *, order: str = "<", tail: bytes = b""
) -> bytes:
    """Tags are (tag, type, count, value or what it points to)."""
    at = 8 + 2 + 12 * len(tags) + 4
    directory, values = struct.pack(order + "H", len(tags)), b""
    for tag, kind, count, value in sorted(tags, key=lambda entry: entry[0]):
        if isinstance(value, bytes):
            pointed, values = at + len(values), values + value
        else:
            pointed = value
        packed = struct.pack(
            order + ("HH" if kind == 3 and count == 1 else "I"),
            *((pointed, 0) if kind == 3 and count == 1 else (pointed,)),
        )
        directory += struct.pack(order + "HHI", tag, kind, count) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8) + directory + bytes(4) + values + tail


def _grey(width: int, height: int, compression: int = 1) -> list[tuple[int, int, int, int | bytes]]:
    head: list[tuple[int, int, int, int | bytes]] = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
    ]
    return head


def _strips(order: str, count: int, compression: int = 1) -> bytes:
    offsets = np.full(count, 8, order + "u4").tobytes()
    tags = _grey(1, 2, compression)
    tags += [(273, 4, count, offsets), (278, 3, 1, 1), (279, 4, count, offsets)]
    return _tiff(tags, order=order)


def _exif_of(tags: int) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 5, 1, 8) for tag in range(1, tags + 1))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(4)


def attacks() -> dict[str, bytes]:
    """Hostile files, by what they do. None of them is a photo."""
    deflated = zlib.compress(bytes(60_000 * 60_000 // 100))
    bomb = zlib.compress(bytes(1_000_000))[:-4] + bytes(4)
    rationals = struct.pack("<II", 1, 3) * 1_000_000
    overlap = np.full(20_000, 400_000, "<u4").tobytes()
    return {
        "JPEG scans": _with_scans(1000, b"", 1000),
        "JPEG scans behind TEM": _with_scans(1000, b"\xff\x01", 1000),
        "JPEG scans behind TEM and bytes as of a length": _with_scans(
            1000, b"\xff\x01\xff\xf0\xfe\xff\x03", 1000
        ),
        "JPEG scans behind restarts and fill bytes": _with_scans(1000, b"\xff\xd3\xff\xff", 1000),
        "JPEG scans behind a length of 0": _with_scans(1000, b"\xff\xe3\0\0", 1000),
        "JPEG scans, fewer but of a large picture": _with_scans(60, b"", 5000),
        "JPEG segments without content": _jpeg(b"\xff\xe5\0\2" * 2_000_000),
        "JPEG comments": _jpeg(b"\xff\xfe\0\3-" * 1_000_000),
        "JPEG fill bytes": _jpeg(b"\xff" * 8_000_000),
        "JPEG restarts": _jpeg(b"\xff\xd0" * 4_000_000),
        "JPEG junk": _jpeg(bytes(8_000_000)),
        "JPEG tables": _jpeg(_segment(0xDB, (b"\0" + bytes(range(1, 65))) * 1000) * 500),
        "JPEG EXIF headers": _jpeg(_segment(0xE1, b"Exif\0\0" * 10_000) * 60),
        "JPEG EXIF parts": _jpeg(_segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 500),
        "JPEG Photoshop blocks": _jpeg(
            _segment(0xED, b"Photoshop 3.0\0" + (b"8BIM\1\1" + bytes(6)) * 5000) * 500
        ),
        "PNG chunks": _png(_chunk(b"prVt", b"") * 1_000_000),
        "PNG pixels in empty chunks": _png(_chunk(b"IDAT", b"") * 1_000_000),
        "PNG texts that unpack": _png(_chunk(b"zTXt", b"a\0\0" + bomb) * 5000),
        "PNG profiles that unpack": _png(_chunk(b"iCCP", b"a\0\0" + bomb) * 5000),
        "PNG EXIF headers": _png(_chunk(b"eXIf", b"Exif\0\0" * 400_000)),
        "PNG EXIF tags": _png(_chunk(b"eXIf", _exif_of(60_000))),
        "WebP chunks": _encoded((64, 48), "WEBP") + b"abcd\0\0\0\0" * 1_000_000,
        "WebP EXIF headers": _encoded((64, 48), "WEBP", exif=b"Exif\0\0" * 400_000),
        "BMP runs of nothing": _bmp(b"\1\0" * 4_000_000, (1, 1_000_000 // 16)),
        "BMP jumps to nowhere": _bmp(b"\0\2\0\0" * 2_000_000, (64, 48)),
        "BMP lines of nothing": _bmp(b"\0\0\1\0" * 10_000, (60_000, 1_000)),
        "BMP runs of 4 bits": _bmp(b"\xff\x11" * 200_000, (8000, 6000), 2),
        "TIFF strips": _strips("<", 1_000_000),
        "TIFF strips, big-endian": _strips(">", 1_000_000),
        "TIFF strips, packed": _strips("<", 1_000_000, 8),
        "TIFF tiles": _tiff(
            [
                *_grey(8000, 8000),
                (322, 3, 1, 16),
                (323, 3, 1, 16),
                (324, 4, 250_000, np.full(250_000, 8, "<u4").tobytes()),
                (325, 4, 250_000, np.full(250_000, 256, "<u4").tobytes()),
            ]
        ),
        "TIFF tile larger than its picture": _tiff(
            [
                *_grey(8, 8, 8),
                (322, 4, 1, 40_000),
                (323, 4, 1, 40_000),
                (324, 4, 1, 200),
                (325, 4, 1, len(deflated)),
            ],
            tail=bytes(64) + deflated,
        ),
        "TIFF rational numbers": _tiff(
            [*_grey(8, 8), (273, 4, 1, 8), (279, 4, 1, 64), (282, 5, 1_000_000, rationals)]
        ),
        "TIFF strips over each other, bits reversed": _tiff(
            [
                *_grey(64, 20_000, 8),
                (266, 3, 1, 2),
                (273, 4, 20_000, np.full(20_000, 8, "<u4").tobytes()),
                (278, 3, 1, 1),
                (279, 4, 20_000, overlap),
            ],
            tail=bytes(400_000),
        ),
        "TIFF tags": b"II*\0\x08\0\0\0" + _exif_of(60_000)[8:],
        "BigTIFF tags": b"II+\0\x08\0\0\0"
        + struct.pack("<QQ", 16, 1_000_000)
        + struct.pack("<HHQQ", 315, 3, 1, 1) * 1_000_000,
    }
