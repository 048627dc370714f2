"""The answers of many photos as one body: lines of JSON, an array, or multipart/mixed.

It is hand-written because libraries make a multipart body as a whole, for a client. Here each part
is sent when its photo is done.
"""

import json
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from server.http.segment.masks import JSON, Encoded
from server.http.segment.parameters import MIXED

__all__ = ["Item", "Lines", "body_of"]


@dataclass(frozen=True)
class Item:
    """One photo's answer, or what is wrong with the photo."""

    index: int
    name: str
    file_name: str | None
    """Of the photo, as the client sent it."""
    status: HTTPStatus
    media_type: str
    answer: Encoded


class Lines:
    """A line of JSON for each photo."""

    opening = b""
    between = b""
    ending = b""

    def __init__(self, media_type: str, *, file_names: bool) -> None:
        self.content_type = media_type
        self._file_names = file_names

    def encoded(self, item: Item) -> bytes:
        """The item's bytes in the body, without what is between two of them."""
        head: dict[str, Any] = {"index": item.index, "name": item.name, "status": int(item.status)}
        if self._file_names:
            head["file_name"] = item.file_name
        member = "result" if item.status is HTTPStatus.OK else "error"
        # The photo's own answer is JSON already. Both are ASCII, since some readers take U+2028
        # and U+0085 for the end of a line.
        start = json.dumps(head).removesuffix("}")
        return f'{start}, "{member}": '.encode() + item.answer.content + b"}\n"


class _Array(Lines):
    """One array of JSON, with the same lines."""

    opening = b"["
    between = b","
    ending = b"]\n"


class _Mixed(Lines):
    """A part for each photo, which may be a file (RFC 2046, 5.1.3)."""

    def __init__(self, media_type: str, *, file_names: bool) -> None:
        self._boundary = uuid.uuid4().hex
        self.ending = f"--{self._boundary}--\r\n".encode()
        super().__init__(f"{media_type}; boundary={self._boundary}", file_names=file_names)

    def encoded(self, item: Item) -> bytes:
        content = item.answer.content
        file_name: tuple[str, ...] = ()
        if self._file_names and item.file_name is not None:
            file_name = (f"Item-File-Name: {quote(item.file_name, safe='')}",)
        lines = (
            f"--{self._boundary}",
            f"Content-Type: {item.media_type}",
            f"Content-Length: {len(content)}",
            f"Item-Index: {item.index}",
            f"Item-Name: {quote(item.name, safe='')}",
            f"Item-Status: {int(item.status)}",
            *file_name,
            *(f"{name}: {value}" for name, value in item.answer.headers.items()),
            "\r\n",
        )
        return "\r\n".join(lines).encode() + content + b"\r\n"


_KINDS: dict[str, type[Lines]] = {JSON: _Array, MIXED: _Mixed}


def body_of(media_type: str, *, file_names: bool) -> Lines:
    """How a body of this type is written, whose items have the photos' file names if asked for."""
    return _KINDS.get(media_type, Lines)(media_type, file_names=file_names)
