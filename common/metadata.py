"""What an ONNX file says of itself, read and written without the libraries that could run it."""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

__all__ = ["entry", "read_metadata"]

# onnx.proto: ModelProto.metadata_props is 14; an entry has its key in 1 and its value in 2.
_PROPERTIES, _KEY, _VALUE = 14, 1, 2
_NUMBER, _BYTES = 0, 2

# Protobuf has no larger message, and no entry is nearly as long.
_LARGEST = 2**31
_LONGEST_ENTRY = 2**20


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file. The graph in it is skipped, so this takes no time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ONNX file.
    """
    metadata = {}
    with path.open("rb") as file:
        for _, found in _fields(file, {_PROPERTIES}):
            parts = dict(_fields(BytesIO(found), {_KEY, _VALUE}))
            metadata[parts.get(_KEY, b"").decode()] = parts.get(_VALUE, b"").decode()
    return metadata


def entry(key: str, value: str) -> bytes:
    """A key and its value, as bytes that may be appended to an ONNX file."""
    return _field(_PROPERTIES, _field(_KEY, key.encode()) + _field(_VALUE, value.encode()))


def _fields(file: BinaryIO, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """The wanted fields of a protobuf message, with their numbers; all others are skipped."""
    while (tag := _number(file)) is not None:
        field, kind = tag >> 3, tag & 7
        size = _number(file)
        if kind not in (_NUMBER, _BYTES) or size is None:
            raise ValueError("it is no ONNX file")
        if kind == _NUMBER:
            continue
        if size > (_LONGEST_ENTRY if field in wanted else _LARGEST):
            raise ValueError("it is no ONNX file")
        if field in wanted:
            yield field, file.read(size)
        else:
            file.seek(size, os.SEEK_CUR)


def _number(file: BinaryIO) -> int | None:
    """The next number, seven bits a byte; None at the end."""
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number
    raise ValueError("it is no ONNX file")


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | _BYTES]) + bytes(length) + content
