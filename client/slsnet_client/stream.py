"""Frames of a camera over a WebSocket. Needs the package websockets: the extra `stream`."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from slsnet_client.errors import ServerBusy, ServerFailed, SlsnetError, Unreachable, error_of
from slsnet_client.photos import Photo, photo_bytes
from slsnet_client.result import Result, result_of

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["Streamed", "streamed"]

_PROTOCOL = "slsnet.v1"

# Close code of RFC 6455, 7.4.1.
_TOO_LARGE = 1009


@dataclass(frozen=True, eq=False)
class Streamed:
    """The answer to one frame of a stream: it has either `result` or `error`."""

    index: int
    """Of the frame among those given, from 0."""
    result: Result | None
    error: SlsnetError | None
    dropped: int
    """Frames of the stream up to now that were dropped: for a newer one, or with a lost stream."""
    latency_s: float
    """Seconds from when the frame was taken from the source to its answer."""


async def streamed(
    url: str,
    frames: Iterable[Photo] | AsyncIterable[Photo],
    *,
    headers: dict[str, str],
    tls: ssl.SSLContext | None,
    query: dict[str, str],
    in_flight: int,
    pause_s: Callable[[int, SlsnetError], float | None],
) -> AsyncGenerator[Streamed, None]:
    """Send frames as there is room for them, and yield their answers.

    A connection that is lost, or that the server ends because it stops or is full, is opened again;
    frames that were unanswered then are dropped.

    Args:
        url: of the WebSocket.
        frames: where the next one is taken once fewer than `in_flight` are unanswered.
        headers: of the handshake.
        tls: for `wss`.
        query: the stream's parameters.
        in_flight: frames that are unanswered at the same time.
        pause_s: from how often it was opened again without an answer in between, and why it ended,
            how long to wait before the next time; None to give up.

    Raises:
        SlsnetError: the server refused the stream, ended it, or was not reached.
    """
    try:
        import websockets  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ImportError(
            "Streams need the package websockets: pip install 'slsnet-client[stream]'."
        ) from error
    address, repeated = f"{url}?{urlencode(query)}", 0
    async with contextlib.aclosing(_Source(frames)) as source:
        while True:
            try:
                async with contextlib.aclosing(
                    _connected(address, headers, tls, source, in_flight)
                ) as answers:
                    async for answer in answers:
                        repeated = 0
                        yield answer
            except (ServerBusy, Unreachable) as error:
                wait_s = pause_s(repeated, error)
                if wait_s is None:
                    raise
                repeated += 1
                await asyncio.sleep(wait_s)
            else:
                return


async def _connected(
    address: str,
    headers: dict[str, str],
    tls: ssl.SSLContext | None,
    source: "_Source",
    in_flight: int,
) -> AsyncGenerator[Streamed, None]:
    """The answers of one connection, until its end or that of the frames."""
    from websockets.exceptions import WebSocketException

    try:
        socket = await _connect(address, headers, tls)
    except (OSError, WebSocketException) as error:
        raise _of_lost(error) from error
    try:
        async with socket:
            _check_ready(json.loads(await socket.recv()))
            sender = _Sender(socket, source, in_flight)
            sending = asyncio.create_task(sender.run())
            try:
                async with contextlib.aclosing(sender.answers(sending)) as answers:
                    async for answer in answers:
                        yield answer
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
    except WebSocketException as error:
        raise _of_lost(error) from error


def _connect(url: str, headers: dict[str, str], tls: ssl.SSLContext | None) -> Any:
    from websockets.asyncio.client import connect
    from websockets.typing import Subprotocol

    return connect(
        url,
        additional_headers={k: v for k, v in headers.items() if k != "User-Agent"},
        user_agent_header=headers["User-Agent"],
        subprotocols=[Subprotocol(_PROTOCOL)],
        compression=None,
        max_size=None,
        ssl=tls,
    )


class _Source:
    """The frames one by one. A frame that is awaited outlives the connection that it was for."""

    def __init__(self, frames: Iterable[Photo] | AsyncIterable[Photo]) -> None:
        self._frames = _each(frames)
        self._next: asyncio.Task[tuple[float, bytes] | None] | None = None
        self.sent = 0
        self.dropped = 0

    async def next(self) -> tuple[float, bytes] | None:
        """The next frame's time and bytes: the same until that is sent. None: the end."""
        self._next = self._next or asyncio.create_task(self._take())
        return await asyncio.shield(self._next)

    def is_sent(self) -> None:
        self._next = None
        self.sent += 1

    async def _take(self) -> tuple[float, bytes] | None:
        try:
            photo = await anext(self._frames)
        except StopAsyncIteration:
            return None
        return time.monotonic(), await asyncio.to_thread(photo_bytes, photo)

    async def aclose(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


class _Sender:
    """Sends frames while few are unanswered, and knows when each was taken."""

    def __init__(self, socket: "ClientConnection", source: _Source, in_flight: int) -> None:
        self._socket = socket
        self._source = source
        # The server counts each connection's frames from 1, and what it drops from 0.
        self._sent_before, self._dropped_before = source.sent, source.dropped
        self._room = asyncio.Semaphore(in_flight)
        self._taken: dict[int, float] = {}

    async def run(self) -> None:
        """Send all frames."""
        while True:
            await self._room.acquire()
            if (frame := await self._source.next()) is None:
                return
            taken, content = frame
            self._source.is_sent()
            self._taken[self._source.sent - self._sent_before] = taken
            await self._socket.send(content)

    async def answers(self, sending: asyncio.Task[None]) -> AsyncGenerator[Streamed, None]:
        """The answers, until all that was sent is answered or dropped."""
        receiving: asyncio.Future[Any] | None = None
        try:
            while not (sending.done() and self._is_over(sending)):
                receiving = receiving or asyncio.ensure_future(self._socket.recv())
                awaited = {receiving} if sending.done() else {receiving, sending}
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    text = receiving.result()
                    receiving = None
                    yield self._answer(json.loads(text))
        finally:
            if receiving is not None:
                receiving.cancel()
            self._source.dropped += len(self._taken)

    def _is_over(self, sending: asyncio.Task[None]) -> bool:
        """Whether nothing more will come; raises what is wrong with a frame."""
        from websockets.exceptions import ConnectionClosed

        error = sending.exception()
        if error is None:
            return not self._taken
        if isinstance(error, ConnectionClosed):
            # Why the server closed is still to be read.
            return False
        raise error

    def _answer(self, message: dict[str, Any]) -> Streamed:
        number = message["frame"]
        if number is None:
            raise _error_in(message)
        latency_s = time.monotonic() - self._taken[number]
        # Those before it that no message named were dropped.
        for older in [sent for sent in self._taken if sent <= number]:
            del self._taken[older]
            self._room.release()
        failed = message["type"] == "error"
        self._source.dropped = self._dropped_before + message["dropped"]
        return Streamed(
            self._sent_before + number - 1,
            None if failed else result_of(message["result"]),
            _error_in(message) if failed else None,
            self._source.dropped,
            latency_s,
        )


async def _each(frames: Iterable[Photo] | AsyncIterable[Photo]) -> AsyncIterator[Photo]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
        return
    source = iter(frames)
    # A camera's next frame may take a while.
    while (picture := await asyncio.to_thread(_next, source)) is not None:
        yield picture


def _next(source: Iterator[Photo]) -> Photo | None:
    return next(source, None)


def _check_ready(message: dict[str, Any]) -> None:
    if message["type"] != "ready":
        raise _error_in(message)


def _error_in(message: dict[str, Any]) -> SlsnetError:
    document = message["error"]
    return error_of(
        document["status"], document, document.get("request_id"), message["retry_after_s"]
    )


def _of_lost(error: Exception) -> SlsnetError:
    """The error of a handshake that failed, or a connection that was lost."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus

    if isinstance(error, InvalidStatus):
        answer = error.response
        document: Any = None
        with contextlib.suppress(ValueError):
            document = json.loads(answer.body or b"")
        if answer.status_code == HTTPStatus.OK:
            return ServerFailed("The server has no streams: is it older than this client?")
        return error_of(
            answer.status_code, document, answer.headers.get("X-Request-ID"), retry_after_s=None
        )
    if isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code == _TOO_LARGE:
        document = {"detail": f"The frame is too large: {error.rcvd.reason}."}
        return error_of(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, document, None, retry_after_s=None)
    return Unreachable(f"The stream was lost: {str(error) or type(error).__name__}.")
