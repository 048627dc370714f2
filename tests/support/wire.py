"""HTTP byte by byte."""

import contextlib
import socket

from tests.support.launch import ServerProcess


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes, however it does."""
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def assert_refusal(answer: bytes, status: int, words: str) -> None:
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    assert b"Connection: close" in head
    assert (b"Retry-After: 1" in head) == (status in (429, 503))
    assert words.encode() in body
