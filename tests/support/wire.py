"""HTTP byte by byte."""

import contextlib
import socket
from pathlib import Path

import pytest

from tests.support.launch import ServerProcess
from tests.support.waiting import until


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=600)


def send_apart(connection: socket.socket, *pieces: bytes) -> None:
    """Each is sent once the server has read the one before."""
    for piece in pieces:
        connection.sendall(piece)
        until(lambda: _is_read(connection))


def _is_read(connection: socket.socket) -> bool:
    own, peer = (f":{port:04X}" for _, port in (connection.getsockname(), connection.getpeername()))
    try:
        lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        pytest.skip("the system does not tell what was read")
    for _, local, remote, _, queues, *_ in map(str.split, lines):
        if local.endswith(peer) and remote.endswith(own):
            return queues.endswith(":00000000")
    # Closed.
    return True


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection, in whatever way."""
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
