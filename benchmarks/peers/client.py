"""A lean HTTP/1.1 client for load: one process, bare sockets, requests prepared as bytes.

Client and server share both cores, so every microsecond here is taken from the server. It is the
same for each server. Answers are parsed only as far as HTTP needs. Every eighth is kept, and its
mask is checked. The client is hand-written because oha sends one body only, and k6 runs JavaScript
for each request (docs/decisions.md).
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import uvloop

LOST = 0
"""Status of a request that was sent, or was due, but got no complete answer."""

_KEEP_EVERY = 8
_PAUSE_S = 0.05
"""Pause of a client in a closed loop after a refusal, so that it does not ask again at once."""


@dataclass(slots=True)
class Answer:
    """The answer to one request; times are seconds of `time.perf_counter`."""

    request: int
    """Index of the request."""
    due: float
    """When the request was sent or, in an open loop, should have been."""
    ended: float
    status: int
    body: bytes | None = None
    retry_after: bool = False
    """Whether the answer had `Retry-After`."""


@dataclass
class Load:
    """A stretch of load, and all answers in it."""

    started: float = 0
    ended: float = 0
    cpu_s: float = 0
    """CPU time that this process used meanwhile, seconds."""
    unsent: int = 0
    """Requests that were due in an open loop while all connections waited for answers."""
    answers: list[Answer] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Length of the stretch."""
        return self.ended - self.started

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block as the stretch; answers after it do not count."""
        cpu, self.started = time.process_time(), time.perf_counter()
        yield
        self.ended, self.cpu_s = time.perf_counter(), time.process_time() - cpu

    def add(self, request: int, due: float, reply: "_Reply") -> None:
        """Record a reply. Before the stretch none counts; after it, only a lost one does."""
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


class Connection(asyncio.Protocol):
    """Sends one request at a time and waits for its answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[_Reply] | None = None
        self._buffer = bytearray()
        self._head = b""
        self._body_from = 0

    @classmethod
    async def open(cls, port: int) -> "Connection":
        """Open a connection. Raises OSError where nobody listens."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    @property
    def is_open(self) -> bool:
        """Whether the connection can send another request."""
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> "asyncio.Future[_Reply]":
        """Send a request. The reply has status `LOST` if the connection ends before it is whole."""
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def close(self) -> None:
        """Close the connection at once, even during a request."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio's class, but do not inherit from it.
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
    """Run clients that send their next request once the last one is answered.

    A request that is unanswered at the end counts neither as an answer nor as a loss. It is
    awaited, since a server that works on for clients that left would do so in the next stretch.

    Args:
        port: port of the server on this machine.
        requests: requests that `post` made; sent in turn.
        clients: number of clients, each with one connection.
        seconds: least length of the stretch.
        lead_s: seconds of load before the stretch, whose answers do not count. So batches end at
            any moment of the stretch, and its edges favour nobody.
        fewest: least number of answers, for which the stretch goes on.
        give_up_s: most seconds by which the stretch goes on.
        drain_s: seconds to wait for the last answers.
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
            # Checked now and then, since an event for each answer would cost the server's time.
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
    """Run clients in a closed loop against a server that is stopped under them.

    A client ends when it finds the port closed. Every answer until then counts.

    Args:
        after_s: seconds until `stop` is called.
        stop: stops the server; it sends SIGTERM, for example.
        seconds: time after that in which all clients should end.
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
    connection: Connection | None = None
    try:
        while not load.ended:
            if connection is None or not connection.is_open:
                try:
                    connection = await Connection.open(port)
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
    """Send requests at a fixed rate, whatever becomes of the earlier ones.

    Args:
        per_s: requests in a second, evenly spread.
        seconds: length of the load.
        connections: most connections. Where all wait for answers, due requests are not sent.
        drain_s: seconds to wait for the last answers; requests without one are lost.
    """

    async def run() -> Load:
        load, idle, tasks = Load(), list[Connection](), set[asyncio.Task[None]]()

        async def ask(number: int, due: float) -> None:
            connection = idle.pop() if idle else None
            try:
                if connection is None or not connection.is_open:
                    connection = await Connection.open(port)
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
    """Send each request on its own connection, all at one moment; return answers in their order."""

    async def run() -> list[Answer]:
        connections = [await Connection.open(port) for _ in requests]
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
    """Cancel the tasks that still run; raise the error that one of them met."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
