"""DICOM files in one body: multipart/related, as DICOMweb has it (PS3.18, 8.6.1.2).

It is hand-written, since neither the standard library's parser of e-mail, which changes the ends of
lines, nor the server's, which takes forms alone, reads such a body.
"""

import uuid
from collections.abc import Sequence
from email.message import Message

__all__ = ["DICOM", "encode", "files"]

DICOM = "application/dicom"


def encode(contents: Sequence[bytes]) -> tuple[str, bytes]:
    """The type and the bytes of a body with these files."""
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
    body = b"".join(part for content in contents for part in (head, content, b"\r\n"))
    return (
        f'multipart/related; type="{DICOM}"; boundary={boundary}',
        body + f"--{boundary}--\r\n".encode(),
    )


def files(content_type: str, body: bytes) -> list[bytes]:
    """The files of a body: one that is a file itself, or has several as its parts.

    Raises:
        ValueError: it is neither.
    """
    header = Message()
    header["Content-Type"] = content_type
    if header.get_content_type() == DICOM:
        return [body]
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/related" or not boundary:
        raise ValueError(f"It is of type {header.get_content_type()}, not {DICOM}.")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    found: list[bytes] = []
    for part in parts:
        if part.startswith(b"--"):
            return found
        _, separator, content = part.partition(b"\r\n\r\n")
        if not separator:
            break
        found.append(content)
    raise ValueError("Its parts do not end.")
