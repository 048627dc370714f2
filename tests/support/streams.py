"""Streams as a client sees them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.support.launch import ServerProcess

__all__ = ["PROTOCOL", "close_of", "opened", "said", "send_refused", "stream"]

PROTOCOL = "slsnet.v1"


@contextlib.contextmanager
def opened(
    server: ServerProcess,
    query: str = "",
    *,
    protocols: Sequence[str] = (PROTOCOL,),
    headers: dict[str, str] | None = None,
    origin: str | None = None,
    path: str = "/stream",
) -> Iterator[ClientConnection]:
    """A WebSocket whose handshake is over."""
    named = dict(headers or {}) | ({"Origin": origin} if origin else {})
    with connect(
        f"ws://127.0.0.1:{server.port}{path}{query}",
        subprotocols=[Subprotocol(protocol) for protocol in protocols] or None,
        additional_headers=named,
        compression=None,
        proxy=None,
        max_size=None,
        open_timeout=60,
    ) as socket:
        yield socket


@contextlib.contextmanager
def stream(server: ServerProcess, query: str = "", **options: Any) -> Iterator[ClientConnection]:
    """A stream that is ready, with time for its frames unless the query says otherwise."""
    if "deadline_ms" not in query:
        query += ("&" if query else "?") + "deadline_ms=600000"
    with opened(server, query, **options) as socket:
        assert said(socket)["type"] == "ready"
        yield socket


def said(socket: ClientConnection) -> dict[str, Any]:
    """The next message."""
    message: dict[str, Any] = json.loads(socket.recv(timeout=600))
    return message


def send_refused(socket: ClientConnection, message: bytes | list[bytes]) -> None:
    """Send what the server closes the stream for, perhaps before all of it is sent."""
    with contextlib.suppress(ConnectionClosed):
        socket.send(message)


def close_of(socket: ClientConnection) -> tuple[int, str]:
    """Code and reason of the close that comes next."""
    with pytest.raises(ConnectionClosed) as closed:
        socket.recv(timeout=600)
    said_last = closed.value.rcvd
    assert said_last is not None, closed.value
    return said_last.code, said_last.reason
