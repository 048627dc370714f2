"""Photos as phones store them, and files that are hard on their decoders."""

import struct
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

__all__ = ["FORMATS", "encode_phone", "is_here", "needs", "phone_attacks", "turned"]

FORMATS = ("AVIF", "HEIC")


def is_here(name: str) -> bool:
    """Whether this machine encodes and decodes the format."""
    return bool(features.check("avif")) if name == "AVIF" else find_spec("pillow_heif") is not None


def needs(name: str) -> None:
    """Skip the test where the format's library is missing."""
    if not is_here(name):
        pytest.skip(f"needs the library for {name}")


def encode_phone(pixels: NDArray[np.uint8], name: str, **options: Any) -> bytes:
    """Encode as a phone would; `options` are those of Pillow's or pillow-heif's `save`."""
    out = BytesIO()
    image = Image.fromarray(pixels)
    if name == "AVIF":
        image.save(out, "AVIF", **{"quality": 90, "speed": 10, **options})
    else:
        import pillow_heif

        pillow_heif.from_pillow(image).save(out, **{"quality": 90, **options})
    return out.getvalue()


def box(kind: bytes, *content: bytes) -> bytes:
    """A box of the container."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The same file, whose header tells this size of every picture."""
    at, changed = 0, bytearray(data)
    while (at := data.find(b"ispe", at + 1)) > 0:
        struct.pack_into(">II", changed, at + 8, width, height)
    return bytes(changed)


def turned(data: bytes, turns: int, mirror: int | None) -> bytes:
    """The same file, to be turned to the left so many quarters, and mirrored then."""
    added = [box(b"irot", bytes([turns]))] if turns else []
    added += [] if mirror is None else [box(b"imir", bytes([mirror]))]
    ipco, ipma = data.index(b"ipco") - 4, data.index(b"ipma") - 4
    (ipco_size,) = struct.unpack_from(">I", data, ipco)
    count = _count(data, ipco + 8, ipco + ipco_size)
    properties = data[ipco + 8 : ipco + ipco_size] + b"".join(added)
    (ipma_size,) = struct.unpack_from(">I", data, ipma)
    body = bytearray(data[ipma + 8 : ipma + ipma_size])
    assert body[:4] == bytes(4)  # version 0, narrow indices
    # The first item is the primary one in these files.
    at = 8 + 2
    body[at] += len(added)
    at += 1 + body[at] - len(added)
    body[at:at] = bytes(0x80 | (count + 1 + index) for index in range(len(added)))
    iprp = box(b"iprp", box(b"ipco", properties), box(b"ipma", bytes(body)))
    start = data.index(b"iprp") - 4
    (size,) = struct.unpack_from(">I", data, start)
    grown = len(iprp) - size
    whole = bytearray(data[:start] + iprp + data[start + size :])
    meta = data.index(b"meta") - 4
    struct.pack_into(">I", whole, meta, struct.unpack_from(">I", data, meta)[0] + grown)
    _move_items(whole, grown)
    return bytes(whole)


def _count(data: bytes, at: int, end: int) -> int:
    count = 0
    while at < end:
        (size,) = struct.unpack_from(">I", data, at)
        at, count = at + size, count + 1
    return count


def _move_items(data: bytearray, by: int) -> None:
    """The items' bytes lie behind the header, which has grown."""
    at = data.index(b"iloc") + 4
    version, sizes, bases = data[at], data[at + 4], data[at + 5]
    assert version in (0, 1) and sizes == 0x44 and bases in (0, 0x40)
    (items,) = struct.unpack_from(">H", data, at + 6)
    at += 8
    for _ in range(items):
        at += 4 + (2 if version else 0)
        if bases:
            (base,) = struct.unpack_from(">I", data, at)
            struct.pack_into(">I", data, at, base + by)
            at += 4
        (extents,) = struct.unpack_from(">H", data, at)
        at += 2
        for _ in range(extents):
            (offset,) = struct.unpack_from(">I", data, at)
            struct.pack_into(">I", data, at, offset + (0 if bases else by))
            at += 8


def phone_attacks(name: str) -> dict[str, bytes]:
    """Hostile files of a format, by what they do."""
    small = encode_phone(np.full((64, 96, 3), 90, np.uint8), name)
    large = encode_phone(np.full((2000, 3000, 3), 90, np.uint8), name)
    head = small[: struct.unpack_from(">I", small)[0]]
    return {
        "a large picture behind a small header": with_size(large, 96, 64),
        "a small picture behind a large header": with_size(small, 60_000, 60_000),
        "a size without end": with_size(small, 0xFFFF_FFFF, 0xFFFF_FFFF),
        "no size": with_size(small, 0, 0),
        "empty boxes": head + box(b"meta", bytes(4), box(b"free") * 1_000_000),
        "empty properties": head
        + box(b"meta", bytes(4), box(b"iprp", box(b"ipco", box(b"free") * 1_000_000))),
        "many items": head
        + box(
            b"meta",
            bytes(4),
            box(b"iprp", box(b"ipma", bytes(4), struct.pack(">I", 2**31), bytes(3_000_000))),
        ),
        "boxes of no length": head + b"\0\0\0\1meta" + bytes(8) * 100_000,
        "the header alone": head,
    }
