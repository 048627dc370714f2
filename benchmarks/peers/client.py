"""A lean HTTP/1.1 client for load: one process, bare sockets, requests prepared as bytes.

Client and server share both cores, so every microsecond here is taken from the server; it is the
same for each server. Answers are parsed only as far as HTTP needs; every eighth is kept, and its
mask is checked. It is hand-written because oha sends one body only and k6 runs JavaScript for each
request (docs/decisions.md).
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import uvloop

__all__ = ["LOST", "Answer", "Load", "at_once", "closed_loop", "open_loop", "post", "until_closed"]

LOST = 0
"""Status of a request that was sent, or was due, and got no complete answer."""

_KEEP_EVERY = 8
_PAUSE_S = 0.05
"""Pause of a client in a closed loop after a refusal, so that it does not come back at once."""


@dataclass(slots=True)
class Answer:
    """The answer to one request; times are seconds of `time.perf_counter`."""

    request: int
    """Index of the request."""
    due: float
    """When it was sent, or in an open loop should have been."""
    ended: float
    status: int
    body: bytes | None = None
    retry_after: bool = False
    """Whether it had `Retry-After`."""


@dataclass
class Load:
    """A stretch of load, and all answers in it."""

    started: float = 0
    ended: float = 0
    cpu_s: float = 0
    """CPU time that this process used meanwhile."""
    unsent: int = 0
    """Requests that were due in an open loop while all connections waited for answers."""
    answers: list[Answer] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """How long the stretch was."""
        return self.ended - self.started

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block as the stretch; answers after it do not count."""
        cpu, self.started = time.process_time(), time.perf_counter()
        yield
        self.ended, self.cpu_s = time.perf_counter(), time.process_time() - cpu

    def add(self, request: int, due: float, reply: "_Reply") -> None:
        """Unless the stretch has not begun, or is over and the reply is one."""
        if not self.started or (self.ended and reply.status != LOST):
            return
        kept = reply.body if len(self.answers) % _KEEP_EVERY == 0 else None
        self.answers.append(
            Answer(request, due, time.perf_counter(), reply.status, kept, reply.later)
        )


class _Reply(NamedTuple):
    status: int
    body: bytes = b""
    later: bool = False


def post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of a POST request."""
    head = {"Host": "127.0.0.1", **headers, "Content-Length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """Sends one request at a time and waits for its answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[_Reply] | None = None
        self._buffer = bytearray()
        self._head = b""
        self._body_from = 0

    @classmethod
    async def open(cls, port: int) -> "_Connection":
        """Raises OSError where nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> "asyncio.Future[_Reply]":
        """Send it; the reply has status `LOST` if the connection ends before it is whole."""
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def close(self) -> None:
        """Close it at once, also during a request."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have asyncio's methods, but not its class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._body_from:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head, self._body_from = bytes(self._buffer[:end]).lower(), end + 4
        if length := _header(self._head, b"content-length"):
            end = self._body_from + int(length)
            if len(self._buffer) >= end:
                self._reply(bytes(self._buffer[self._body_from : end]))
        elif b"chunked" in self._head and self._buffer.endswith(b"0\r\n\r\n"):
            self._reply(_joined(bytes(self._buffer[self._body_from :])))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(_Reply(LOST))

    def _reply(self, body: bytes) -> None:
        if self._answered is not None and not self._answered.done():
            later = bool(_header(self._head, b"retry-after"))
            self._answered.set_result(_Reply(int(self._head[9:12]), body, later))
        if _header(self._head, b"connection") == b"close":
            self.close()
        self._buffer.clear()
        self._body_from = 0


def _header(head: bytes, name: bytes) -> bytes:
    start = head.find(b"\r\n" + name + b":")
    if start < 0:
        return b""
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else len(head)].strip()


def _joined(chunked: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        end = chunked.index(b"\r\n", at)
        size = int(chunked[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(chunked[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def closed_loop(
    port: int,
    requests: Sequence[bytes],
    *,
    clients: int,
    seconds: float,
    lead_s: float = 0,
    fewest: int = 0,
    give_up_s: float = 30,
    drain_s: float = 10,
) -> Load:
    """Clients that send their next request once the last one is answered.

    A request that is unanswered at the end counts neither as an answer nor as a loss. It is waited
    for: a server that goes on working for clients that left would do so in the next stretch.

    Args:
        port: on this machine.
        requests: as `post` makes them; sent in turn.
        clients: connections.
        seconds: how long at least.
        lead_s: load before that, until which no answer counts: batches then end at any moment
            of the stretch, and its edges favour nobody.
        fewest: answers to wait for beyond that.
        give_up_s: how much longer at most.
        drain_s: how long to wait then for what is not answered.
    """

    async def run() -> Load:
        load, numbers = Load(), itertools.count()
        tasks = [
            asyncio.create_task(_client(port, requests, numbers, load)) for _ in range(clients)
        ]
        await asyncio.sleep(lead_s)
        with load.measured():
            await asyncio.sleep(seconds)
            give_up = load.started + seconds + give_up_s
            # Looked at now and then: an event for each answer would cost the server's time.
            while len(load.answers) < fewest and time.perf_counter() < give_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.wait(tasks, timeout=drain_s)
        await _end(tasks)
        return load

    return uvloop.run(run())


def until_closed(
    port: int,
    requests: Sequence[bytes],
    *,
    clients: int,
    after_s: float,
    stop: Callable[[], None],
    seconds: float,
) -> Load:
    """Clients in a closed loop against a server that is told to stop under them.

    A client is done when it finds the port closed; every answer until then counts.

    Args:
        after_s: when `stop` is called.
        stop: sends SIGTERM, say.
        seconds: how long to wait for all clients to be done after that.
    """

    async def run() -> Load:
        load, numbers = Load(), itertools.count()
        tasks = [
            asyncio.create_task(_client(port, requests, numbers, load, until_closed=True))
            for _ in range(clients)
        ]
        with load.measured():
            await asyncio.sleep(after_s)
            stop()
            await asyncio.wait(tasks, timeout=seconds)
        await _end(tasks)
        return load

    return uvloop.run(run())


async def _client(
    port: int,
    requests: Sequence[bytes],
    numbers: Iterator[int],
    load: Load,
    *,
    until_closed: bool = False,
) -> None:
    connection: _Connection | None = None
    try:
        while not load.ended:
            if connection is None or not connection.is_open:
                try:
                    connection = await _Connection.open(port)
                except OSError:
                    if until_closed:
                        return
                    await asyncio.sleep(_PAUSE_S)
                    continue
            number = next(numbers) % len(requests)
            due = time.perf_counter()
            reply = await connection.ask(requests[number])
            if not load.ended:
                load.add(number, due, reply)
            if reply.status != 200:
                await asyncio.sleep(_PAUSE_S)
    finally:
        if connection is not None:
            connection.close()


def open_loop(
    port: int,
    requests: Sequence[bytes],
    *,
    per_s: float,
    seconds: float,
    connections: int = 1000,
    drain_s: float = 10,
) -> Load:
    """Requests at a fixed rate, whatever becomes of those before.

    Args:
        per_s: requests a second, evenly.
        seconds: how long.
        connections: at most; where all wait for answers, what is due is not sent.
        drain_s: how long to wait then for what is not answered; what is not by then is lost.
    """

    async def run() -> Load:
        load, idle, tasks = Load(), list[_Connection](), set[asyncio.Task[None]]()

        async def ask(number: int, due: float) -> None:
            connection = idle.pop() if idle else None
            try:
                if connection is None or not connection.is_open:
                    connection = await _Connection.open(port)
                reply = await connection.ask(requests[number])
            except OSError:
                load.add(number, due, _Reply(LOST))
                return
            except asyncio.CancelledError:
                load.add(number, due, _Reply(LOST))
                if connection is not None:
                    connection.close()
                return
            load.add(number, due, reply)
            idle.append(connection)

        with load.measured():
            for number in range(round(per_s * seconds)):
                due = load.started + number / per_s
                if (wait_s := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                if len(tasks) < connections:
                    task = asyncio.create_task(ask(number % len(requests), due))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                else:
                    load.unsent += 1
                    await asyncio.sleep(0)
            if tasks:
                await asyncio.wait(tasks, timeout=drain_s)
        await _end(tasks)
        for connection in idle:
            connection.close()
        return load

    return uvloop.run(run())


def at_once(port: int, requests: Sequence[bytes], timeout_s: float = 30) -> list[Answer]:
    """Each request on a connection of its own, all at the same moment; answers in their order."""

    async def run() -> list[Answer]:
        connections = [await _Connection.open(port) for _ in requests]
        due = time.perf_counter()
        replies = [
            connection.ask(request)
            for connection, request in zip(connections, requests, strict=True)
        ]
        await asyncio.wait(replies, timeout=timeout_s)
        for connection in connections:
            connection.close()
        answers = []
        for number, reply in enumerate(replies):
            status, body, later = reply.result() if reply.done() else _Reply(LOST)
            answers.append(Answer(number, due, time.perf_counter(), status, body, later))
        return answers

    return uvloop.run(run())


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel those that still run; raise what one of them stumbled over."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
