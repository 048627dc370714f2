"""A request's body → the bytes of its photo, in memory only.

The framework's form parser writes parts to temporary files, and a patient's photo must never touch
the disk. So forms are parsed with the library `multipart`, in memory.
"""

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import multipart
from starlette.datastructures import Headers
from starlette.types import Receive

from server.http.errors import BadRequest, BodyEncoded
from server.inference.errors import (
    ClientGone,
    Problem,
    TooLarge,
    Unprocessable,
    UnsupportedType,
)
from server.inference.submission import Body

__all__ = [
    "DICOM",
    "FIELD",
    "MULTIPART",
    "RAW_TYPES",
    "Fields",
    "Part",
    "check_type",
    "image_in_body",
    "is_form",
    "read_body",
    "read_parts",
]

FIELD = "file"
"""Name of the form field that holds the photo."""

MULTIPART = "multipart/form-data"

Fields = Sequence[tuple[str, str]]
"""Names and values of a form's fields, without its photos."""

DICOM = "application/dicom"

RAW_TYPES = (
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/tiff",
    "image/bmp",
    "image/avif",
    "image/heic",
    DICOM,
    "application/octet-stream",
)
"""Content types of a body that is the photo itself, by their standard names."""

# Types for unknown bytes. Any type that begins with `image/` is accepted as well.
_UNTOLD_TYPES = (
    "",
    "*/*",
    "application/octet-stream",
    "application/x-octet-stream",
    "application/binary",
    "application/unknown",
    "application/x-image",
    "binary/octet-stream",
)

_HINTS = {
    "application/x-www-form-urlencoded": " curl --data-binary names this type unless it is told"
    " another one: -H 'Content-Type: image/jpeg'."
}

# The boundary is missing or differs from the body's, most often because a program set it by hand.
_LEAVE_TO_CLIENT = (
    "Do not set Content-Type yourself: whatever makes the form (curl -F, FormData, files= in"
    " requests) knows the boundary and sets both."
)
_FORM_START = re.compile(rb"--[^\r\n]{1,200}\r?\nContent-", re.IGNORECASE)

_MAX_PARTS = 16

# Bytes of a field that holds a parameter: all values are shorter.
_MAX_VALUE = 100

# Characters of a field's name, which its photo's answer repeats.
_MAX_NAME = 200


def check_type(headers: Headers) -> None:
    """Refuse a body that is certainly no photo before it is read; otherwise its bytes decide.

    Raises:
        UnsupportedType: the type is neither a form nor an image that is served.
        BodyEncoded: the body is compressed.
    """
    _check_encoding(headers)
    kind = _media_type(headers.get("content-type", ""))
    if kind != MULTIPART and not kind.startswith("image/") and kind not in (DICOM, *_UNTOLD_TYPES):
        raise UnsupportedType(
            f"A body of type {kind[:80]} is not served. Send the photo as the field {FIELD!r} of a"
            f" {MULTIPART} form, or as the body itself with one of these types:"
            f" {', '.join(RAW_TYPES)}.{_HINTS.get(kind, '')}"
        )


def _check_encoding(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise BodyEncoded(
            f"A body with Content-Encoding {encoding[:40]} is not served: photos are compressed"
            " already. Send it without Content-Encoding.",
            # RFC 9110, 15.5.16.
            {"Accept-Encoding": "identity"},
        )


async def read_body(
    receive: Receive, headers: Headers, take: Callable[[int], None], *, max_bytes: int
) -> Body:
    """Read the whole body; refuse it as soon as it is known to be too large.

    Args:
        receive: the ASGI channel.
        headers: the request's.
        take: accounts for bytes that have come. Announced bytes do not count, so that a slow sender
            takes nothing from others. See `ByteBudget.account`.
        max_bytes: largest body that is read.

    Raises:
        TooLarge: the announced length, or the bytes that came, exceed `max_bytes`.
        ClientGone: the client hung up before the end.
    """
    chunks = [chunk async for chunk in _chunks(receive, headers, max_bytes=max_bytes, take=take)]
    return Body(chunks[0] if len(chunks) == 1 else b"".join(chunks))


@dataclass(frozen=True)
class Part:
    """One photo of a request that has several."""

    name: str
    """The name of its field in the form."""
    file_name: str | None
    """The file name that the client sent."""
    size: int
    """Bytes that it takes from the budget."""
    photo: Body | Problem
    """Its bytes, or what is wrong with them."""


async def read_parts(
    receive: Receive,
    headers: Headers,
    take: Callable[[int], None],
    *,
    max_bytes: int,
    max_parts: int,
    max_part_bytes: int,
    parameters: Collection[str],
) -> tuple[list[Part], Fields]:
    """Read all photos of a form, whatever the names of their fields, and its parameters.

    A field is a parameter if its value is too short for a photo, and it has no file name or the
    name of a parameter: some clients give every field a file name.

    Args:
        receive, headers, take, max_bytes: as for `read_body`.
        max_parts: most photos in the form.
        max_part_bytes: largest photo; the bytes of a larger one are dropped.
        parameters: the names of the path's parameters.

    Raises:
        BadRequest: there is no body, or the form is malformed or empty.
        UnsupportedType: the body is not a form.
        BodyEncoded: it is compressed.
        TooLarge: it has too many photos, or bytes.
        ClientGone: the client hung up before the end.
    """
    _check_encoding(headers)
    content_type = headers.get("content-type", "")
    if _media_type(content_type) != MULTIPART:
        how = f"Several photos are sent as a {MULTIPART} form, each in a field of its own."
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            raise BadRequest(f"The request has no body. {how}")
        raise UnsupportedType(how)
    too_many = TooLarge(f"The form has more than the {max_parts} photos that one request may have.")
    entries: list[_Entry] = []
    with _form_parser(content_type, max_parts=max_parts + _MAX_PARTS + 1) as parse:
        async for chunk in _chunks(receive, headers, max_bytes=max_bytes, take=take):
            for event in parse(chunk):
                if isinstance(event, multipart.MultipartSegment):
                    entries.append(_Entry(event))
                    if len(entries) > max_parts + _MAX_PARTS:
                        raise too_many
                elif event is not None:
                    entries[-1].add(event, max_part_bytes)
    parts: list[Part] = []
    fields: list[tuple[str, str]] = []
    for entry in entries:
        is_named = entry.file_name is None or entry.name in parameters
        if entry.size <= _MAX_VALUE and is_named:
            fields.append((entry.name, _field_value(entry.name, b"".join(entry.chunks))))
        else:
            parts.append(entry.part(max_part_bytes))
    if not parts:
        raise BadRequest("The form is empty, or has no photo: put each into a field of its own.")
    if len(parts) > max_parts:
        raise too_many
    return parts, fields


class _Entry:
    """A field of a form, as it arrives piece by piece."""

    def __init__(self, field: multipart.MultipartSegment) -> None:
        self.name = _field_name(field.name)
        self.file_name = None if field.filename is None else _field_name(field.filename)
        self.size = 0
        self.chunks: list[bytes] = []

    def add(self, chunk: bytes | bytearray, most: int) -> None:
        """Add a piece; once the field is larger than `most` bytes, all of it is dropped."""
        self.size += len(chunk)
        if self.size <= most:
            self.chunks.append(bytes(chunk))
        else:
            self.chunks.clear()

    def part(self, most: int) -> Part:
        """Hand the photo over; it may have `most` bytes."""
        photo: Body | Problem = Body(b"".join(self.chunks))
        self.chunks.clear()
        if self.size > most:
            photo = TooLarge(
                f"The photo has {self.size} bytes, {most} are allowed. Send a smaller one, or"
                " one that is compressed more."
            )
        elif not self.size:
            photo = BadRequest("The field is empty: put the photo's bytes there.")
        return Part(self.name, self.file_name, self.size, photo)


def _field_name(name: str | None) -> str:
    # The parser reads names as Latin-1, which never fails; nearly all clients send UTF-8.
    return (name or "").encode("latin-1").decode("utf-8", "replace")[:_MAX_NAME]


async def _chunks(
    receive: Receive, headers: Headers, *, max_bytes: int, take: Callable[[int], None]
) -> AsyncIterator[bytes]:
    too_large = TooLarge(
        f"The body is larger than the {max_bytes} bytes that are allowed. Send a smaller photo, or"
        " one that is compressed more."
    )
    announced = headers.get("content-length")
    # It is a number: the HTTP parser refuses anything else.
    if announced is not None and int(announced) > max_bytes:
        raise too_large
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        take(len(chunk))
        yield chunk


def is_form(content_type: str) -> bool:
    """Whether a body of this type is a multipart form."""
    return _media_type(content_type) == MULTIPART


def image_in_body(body: bytes, content_type: str) -> tuple[bytes, Fields]:
    """The photo's bytes: the body itself, or the field `file` of a form; and its other fields.

    Args:
        body: the whole body.
        content_type: the body's.

    Raises:
        BadRequest: the body is empty, the form is malformed, or it has not exactly one such field.
    """
    if not body:
        raise BadRequest(
            "The request has no body. Send a photo, for example: curl -F file=@lesion.jpg"
            " http://…/segment -o mask.png"
        )
    if not is_form(content_type):
        if _FORM_START.match(body):
            raise BadRequest(
                f"The body is a form, but its Content-Type is {content_type[:80] or 'missing'}."
                f" {_LEAVE_TO_CLIENT}"
            )
        return body, ()
    images: list[list[bytes]] = []
    others: list[tuple[str, list[bytes]]] = []
    wanted: list[bytes] = []
    with _form_parser(content_type, max_parts=_MAX_PARTS) as parse:
        for event in parse(body):
            if isinstance(event, multipart.MultipartSegment):
                wanted = []
                if event.name == FIELD:
                    images.append(wanted)
                else:
                    others.append((_field_name(event.name), wanted))
            elif event is not None:
                wanted.append(bytes(event))
    if not images:
        names = [repr(name[:40]) if name else "a field without a name" for name, _ in others]
        found = f" It has {', '.join(names)}." if names else ""
        raise BadRequest(f"The form has no field {FIELD!r}: put the photo there.{found}")
    if len(images) > 1:
        raise BadRequest(
            f"The form has {len(images)} fields {FIELD!r}: send one photo in a request."
        )
    image = b"".join(images[0])
    if not image:
        raise BadRequest(f"The field {FIELD!r} is empty: put the photo's bytes there.")
    return image, [(name, _field_value(name, b"".join(value))) for name, value in others]


def _field_value(name: str, value: bytes) -> str:
    if len(value) > _MAX_VALUE:
        raise Unprocessable(
            f"The field {name[:40]!r} has {len(value)} bytes, which no parameter has: the photo"
            f" goes into the field {FIELD!r}."
        )
    return value.decode("utf-8", "replace")


@contextlib.contextmanager
def _form_parser(
    content_type: str, *, max_parts: int
) -> Iterator[Callable[[bytes], Iterator[Any]]]:
    """Make a parser that turns a form's bytes into fields and their contents, piece by piece."""
    _, options = multipart.parse_options_header(content_type)
    boundary = options.get("boundary")
    if not boundary:
        raise BadRequest(
            f"Content-Type: {MULTIPART} comes without its boundary, by which the form's fields are"
            f" told apart. {_LEAVE_TO_CLIENT}"
        )
    try:
        with multipart.PushMultipartParser(
            boundary,
            max_segment_count=max_parts,
            # Latin-1 never fails: file names come in any charset.
            header_charset="latin-1",
        ) as parser:
            yield parser.parse
    except multipart.MultipartError as error:
        raise BadRequest(f"The multipart form is malformed: {error.args[0]}.") from error


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
