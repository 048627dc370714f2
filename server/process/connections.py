"""A client's connection, with limits on its time and its bytes.

Uvicorn speaks HTTP. It has no limit on a slow head or body, and its `limit_concurrency` counts
requests, not connections. So this is hand-written, as a class for uvicorn's setting `http`.
Whatever a client does, its connection is closed in bounded time and holds a bounded number of
bytes:

- a request's head must be there within `head_timeout_s`, with at most `max_header_bytes`
- a body or an answer that is slower than `min_bytes_per_s` for `stall_timeout_s` is cut off; the
  rest of a refused body is thrown away for at most as long
- `max_connections` are held. Others are answered 503 and closed, unless they ask for health or
  metrics: a full process works, and must not be killed for being full
- connections in a TLS handshake count too; if there are too many, the oldest is closed
- fewer are held where the system allows few open files, so that some files stay free

Each request that came whole gets its answer, also while the client still sends (RFC 9112, 9.6): the
server closes its own side first, and throws away what comes until the client closes too, for a
bounded time. Bytes that are no request are refused after the answers that are due. A client that
has closed its side is still answered, except over TLS, where that ends the connection.

A wish for a WebSocket at `/stream` is granted: from then on `server.process.streams` has the
connection. Any other wish for another protocol (`Upgrade`) is answered in HTTP/1.1, as RFC 9110
(7.8) allows.
"""

import asyncio
import contextlib
import json
import re
import resource
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, cast

import httptools
from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveCallable,
    ASGISendCallable,
    ASGISendEvent,
    HTTPScope,
    Scope,
)
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from server.http.access import OPEN
from server.http.prefix import without_prefix
from server.http.problems import PROBLEM_JSON
from server.inference.budgets import ByteBudget
from server.observe.metrics import Metrics
from server.process.streams import Stream
from server.settings import Settings

__all__ = ["WANTED_ON_TOP", "Connection", "House"]

# A client may take this long to read its last answer: closing at once would reset the connection,
# and the answer with it. In a drain an idle TLS client has as long to say goodbye.
_FAREWELL_S = 2

# Connections kept after their last answer. If there are more, the oldest is cut at once.
_FAREWELLS = 256

# Bytes of one connection that are thrown away. A client that reads its answer stops long before.
_MOST_DISCARDED = 256 * 2**20

# Seconds between the interim answers to a client that closed its side. They find out whether it is
# gone: after the first its system says so, and the next fails.
_PROBE_S = 0.25
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"

# Connections above the limit that may send a head. If there are more, the oldest is refused.
_ASKED = 16
# Connections beside these that may be in their TLS handshake, at least.
_ARRIVING = 16

# Open files beside the connections, if the system allows enough.
_OTHER_FILES = 224

_SOCKETS_ON_TOP = _FAREWELLS + _ASKED + _ARRIVING
WANTED_ON_TOP = _SOCKETS_ON_TOP + _OTHER_FILES
"""Files that a server needs beside those of the connections that it holds."""

# Paths that are answered on connections above the limit.
_ALWAYS_ANSWERED = {*OPEN, "/metrics"}

# The path of a WebSocket.
_STREAM = "/stream"

# Requests that a client may send before the first of them is answered.
_MAX_PIPELINE = 32

# Bytes of a refused body that are thrown away, so that its connection can stay.
_MOST_THROWN_AWAY = 2**20

# What an answer's head begins with.
_HEAD = b"HTTP/1.1 "

# Bytes of a body that are copied behind its head; more are written by themselves.
_JOINED = 2**16

# The possible ends of a head or a chunked body; their first bytes may have come before.
_ENDS = re.compile(rb"\A(?:\r?\n\r\n|\r?\n)|\r\n\r\n")


class _Refused(Exception):
    """The request is refused for its head; it has been answered already."""


class _Transport:
    """A connection's transport, which is closed in another way, and sends heads with their bodies.

    Uvicorn writes the head of an answer by itself, and uvloop sends each write at once. So a client
    on this machine would wake twice, and take the processor in between.
    """

    def __init__(self, connection: "Connection", transport: asyncio.Transport) -> None:
        self._connection = connection
        self._transport = transport
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection._is_parting or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(_HEAD):
            self._head = data
            self._connection.loop.call_soon(self.flush)
        elif len(data) > _JOINED:
            self.flush()
            self._transport.write(data)
        else:
            self._head += data
            self.flush()

    def flush(self) -> None:
        """Write a head that waits for its body."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def forget(self) -> None:
        """Drop a head that waits: there is nobody left to send it to."""
        self._head = b""

    def get_write_buffer_size(self) -> int:
        return len(self._head) + self._transport.get_write_buffer_size()

    def close(self) -> None:
        self.flush()
        self._connection._close(self._transport)


def _until_closed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """Answers of unknown length end with the connection: HTTP/1.0 has no chunks."""

    async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        is_open_ended = False

        async def send_plain(message: ASGISendEvent) -> None:
            nonlocal is_open_ended
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message.get("headers", ())}
                if is_open_ended := b"content-length" not in names:
                    cycle.chunked_encoding = False
            elif is_open_ended and message["type"] == "http.response.body":
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return cast(ASGI3Application, answer)


class House:
    """What the connections of one server share."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        refuses: Callable[[HTTPScope], float | None] = lambda _scope: None,
        body_bytes: ByteBudget | None = None,
    ) -> None:
        """Begin with no connection.

        Args:
            refuses: in how many seconds the application is to refuse a request, which it will do at
                once, without the body and without waiting for anything; None if it will not. Asked
                again when they are over.
            body_bytes: the budget of bytes in flight, for frames of streams.
        """
        self.settings = settings
        self.metrics = metrics
        self.refuses = refuses
        self.body_bytes = body_bytes or ByteBudget(settings.max_bytes_in_flight)
        self.leaving: dict[Connection, None] = {}
        """Connections that have had their last answer and are not closed yet, the oldest first."""
        self.asked: dict[Connection, None] = {}
        """Connections above the limit that have not sent a head yet, the oldest first."""
        self.arriving: dict[Connection, asyncio.Task[Any]] = {}
        """Connections in their TLS handshake, the oldest first."""
        self.most = settings.max_connections
        """The most connections that are held."""
        self._most_sockets = self.most + _SOCKETS_ON_TOP
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY and files < self.most + WANTED_ON_TOP:
            # If files are short, half of those left.
            left = files - len(list(Path("/proc/self/fd").iterdir()))
            self._most_sockets = max(files - _OTHER_FILES, left // 2)
            on_top = min(_SOCKETS_ON_TOP, self._most_sockets // 2)
            self.most = min(self.most, max(1, self._most_sockets - on_top))

    def make_room(self, connections: int) -> None:
        """Close a connection if there are too many; each of `connections` has been made.

        The one that has sent least goes first, and of these the oldest.
        """
        held = connections - len(self.leaving) - len(self.asked)
        if len(self.arriving) > max(_ARRIVING, self.most - held):
            self._cut_arriving()
        elif len(self.arriving) + connections > self._most_sockets:
            if self.leaving or self.asked:
                oldest = next(iter(self.leaving or self.asked))
                self.leaving.pop(oldest, None)
                self.asked.pop(oldest, None)
                self.metrics.connections_refused.labels("too_many").inc()
                oldest.transport.abort()
            else:
                self._cut_arriving()

    def _cut_arriving(self) -> None:
        oldest = next(iter(self.arriving))
        self.arriving.pop(oldest).cancel()
        self.metrics.connections_refused.labels("too_many").inc()


class Connection(HttpToolsProtocol):
    """Uvicorn's protocol with limits; see the module's description."""

    def __init__(
        self,
        house: House,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._house = house
        self._settings = house.settings
        self._metrics = house.metrics
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._refusal_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._refused = False
        self._refusal = b""
        self._is_parting = False
        self._is_last = False
        self._is_half_closed = False
        self._stream: Stream | None = None
        self._discarded = 0
        self._in_body = False
        self._is_chunked = False
        self._content_length = 0
        self._body_bytes = 0
        self._head_bytes = 0
        self._bytes_between_bodies = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Transport(self, transport)))
        self._house.arriving.pop(self, None)
        self._expect_head()
        if self._is_full:
            asked = self._house.asked
            asked[self] = None
            if len(asked) > _ASKED:
                oldest = next(iter(asked))
                del asked[oldest]
                oldest._refuse_one_too_many()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._body_timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._house.leaving.pop(self, None)
        self._house.asked.pop(self, None)
        cast(_Transport, self.transport).forget()
        # Uvicorn tells only the last request.
        self._hang_up()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            self._discard(len(data))
            return
        self._unset_keepalive_if_required()
        self._bytes_between_bodies += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if not isinstance(error.__context__, _Refused):
                self._refuse(
                    HTTPStatus.BAD_REQUEST, "malformed", "What was sent is not an HTTP/1.1 request."
                )
            return
        except _Refused:
            return
        if self._stream is not None:
            return
        # The bytes of one header, or one piece of chunked encoding, that never ends.
        if self._bytes_between_bodies > self._settings.max_header_bytes:
            self._refuse_head()
        elif not self._in_body and self._is_answered and self.timeout_keep_alive_task is None:
            self._expect_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep it open for the answers that are due."""
        # After this the system's transport may close, and takes no more.
        cast(_Transport, self.transport).flush()
        if self.transport.is_closing() or self.scheme == "https":
            return False
        last = self._drop_unfinished()
        if last is None:
            return False
        self._is_half_closed = True
        if not self._refused:
            last.keep_alive = False
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._probe_timer = self.loop.call_later(_PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        if self.transport.is_closing():
            return
        running = self._running
        # HTTP/1.0 has no interim answers, and within an answer it would be taken for a part of it.
        if running and not running.response_started and running.scope["http_version"] == "1.1":
            self.transport.write(_PROBE)
        self._probe_timer = self.loop.call_later(_PROBE_S, self._probe)

    def _parse(self, data: bytes) -> None:
        """Give the parser one head or body at a time, and after a chunked one a new parser.

        The old one would take the last trailer for the first header of the next request.
        """
        start = 0
        while start < len(data):
            if self._in_body and not self._is_chunked:
                end = min(len(data), start + self._content_length - self._body_bytes)
            else:
                found = _ENDS.search(data, start)
                end = found.end() if found else len(data)
            self._feed(data[start:end])
            start = end
            if self._stream is not None:
                if start < len(data):
                    self._stream.data_received(data[start:])
                return
            if self._is_chunked and not self._in_body:
                self._is_chunked = False
                self._renew_parser()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._wants_stream:
                    self._become_stream()
                    return
                # The parser takes the body for another protocol's bytes, and cannot be told
                # otherwise; so a new one reads the request without that header.
                data = self._head(without=b"upgrade") + data[upgrade.args[0] :]
                self._renew_parser()

    @property
    def _wants_stream(self) -> bool:
        """Whether the request is for a WebSocket, and nothing is left to answer before it."""
        names = {name for name, _ in self.headers}
        path = self.url.partition(b"?")[0].decode("latin-1")
        return (
            without_prefix(path, self._settings.root_path) == _STREAM
            and self.parser.get_method() == b"GET"
            and self.parser.get_http_version() == "1.1"
            and self._get_upgrade() == b"websocket"
            and not names & {b"content-length", b"transfer-encoding"}
            and self._is_answered
            and not self.pipeline
        )

    def _become_stream(self) -> None:
        if self in self._house.asked and self._is_full:
            self._refuse_one_too_many()
            raise _Refused
        self._house.asked.pop(self, None)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self.connections.discard(self)
        self.flow.resume_reading()
        self._stream = Stream(
            self.config,
            self.server_state,
            self.app_state,
            settings=self._settings,
            metrics=self._metrics,
            budget=self._house.body_bytes,
        )
        cast(_Transport, self.transport).flush()
        transport = cast(_Transport, self.transport)._transport
        self._stream.connection_made(transport)
        transport.set_protocol(self._stream)
        self._stream.data_received(self._head())

    def _renew_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # Uvicorn does the same.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _head(self, *, without: bytes = b"") -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != without]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        if self.transport.is_closing():
            # A request before it in the same bytes has had the last answer.
            raise _Refused
        if self._is_chunked:
            # Its parser may hold a trailer still.
            self._reject(
                HTTPStatus.BAD_REQUEST, "malformed", "A request follows where none can begin."
            )
        super().on_message_begin()
        self._head_bytes = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        # Also called for the trailers of a chunked body, which are no headers (RFC 9110, 6.5.1): a
        # key among them must not open anything.
        if not self._in_body:
            super().on_header(name, value)
        self._count_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._refuse_the_ambiguous()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._reject(
                    HTTPStatus.BAD_REQUEST, "malformed", "CONNECT is for proxies, this is none."
                )
            # It is parsed again, without that header.
            return
        if len(self.pipeline) >= _MAX_PIPELINE:
            self._reject(
                HTTPStatus.TOO_MANY_REQUESTS,
                "pipeline",
                f"More than {_MAX_PIPELINE} requests were sent before any was answered.",
            )
        is_on_top = self in self._house.asked and self._is_full
        if is_on_top and not self._is_always_answered:
            self._refuse_one_too_many()
            raise _Refused
        self._house.asked.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._in_body = True
        headers = dict(self.headers)
        self._is_chunked = b"transfer-encoding" in headers
        self._content_length = int(headers.get(b"content-length", 0))
        self._body_bytes = 0
        self._bytes_between_bodies = 0
        self._watch_body()
        super().on_headers_complete()
        if is_on_top:
            self.cycle.keep_alive = False

    def _refuse_the_ambiguous(self) -> None:
        """Refuse what a proxy in front may have read in another way (RFC 9112, 3.2 and 6.1)."""
        hosts = [value for name, value in self.headers if name == b"host"]
        # The parser takes `chunked` with spaces behind it for `chunked`, and leaves them there.
        codings = [
            value.lower().rstrip(b" ")
            for name, value in self.headers
            if name == b"transfer-encoding"
        ]
        if len(hosts) > 1:
            self._reject(
                HTTPStatus.BAD_REQUEST, "malformed", "The request has more than one Host header."
            )
        if codings not in ([], [b"chunked"]):
            self._reject(
                HTTPStatus.NOT_IMPLEMENTED,
                "malformed",
                "No Transfer-Encoding is read but chunked: send the body as it is.",
            )

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._bytes_between_bodies = 0
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._bytes_between_bodies = 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        super().on_message_complete()
        is_over = self.transport.is_closing() or self.timeout_keep_alive_task is not None
        if self._is_answered and not is_over:
            # The request was refused, and this body thrown away.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        wait_s = self._house.refuses(cycle.scope)
        if wait_s:
            # Until then its sender is held up by what it sends.
            self.flow.pause_reading()
            self._refusal_timer = self.loop.call_later(wait_s, self._end_wait)
            return
        if wait_s is not None:
            self._shed(cycle, app)
            return
        if cycle.scope["http_version"] < "1.1":
            app = _until_closed(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _end_wait(self) -> None:
        """Refuse a request that waits to be refused, or let it in after all."""
        if self._refusal_timer is not None and self._running is not None:
            self._refusal_timer.cancel()
            self._refusal_timer = None
            self._start_asgi_task(self._running, self.app)

    def _shed(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Let the application refuse without a task, and write its answer at once."""
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        with contextlib.suppress(StopIteration):
            refusing: Any = app(cycle.scope, cycle.receive, send)
            refusing.send(None)
        start, body = messages
        headers = [*cycle.default_headers, *start["headers"]]
        # A client that sends much more should stop, so the connection is closed.
        goes_on = cycle.more_body and (self._is_chunked or self._content_length > _MOST_THROWN_AWAY)
        closing = (b"connection", b"close")
        cycle.keep_alive &= not goes_on and closing not in headers
        if not cycle.keep_alive and closing not in headers:
            headers.append(closing)
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(
            b"".join([STATUS_LINE[start["status"]], *lines, b"\r\n", body["body"]])
        )
        cycle.response_started = cycle.response_complete = True
        cycle.body.clear()
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal and self._drop_unfinished() is None:
            self._send_refusal()
            return
        if self._in_body and self._is_answered:
            # No client reads it any more.
            if self._body_timer is not None:
                self._body_timer.cancel()
            self._body_timer = self.loop.call_later(
                self._settings.stall_timeout_s, self._cut, "body_discarded"
            )
        if self.transport.get_write_buffer_size():
            self._watch_writing()

    def shutdown(self) -> None:
        self._is_last = True
        super().shutdown()
        self._end_wait()
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self._say_goodbye()

    def _close(self, transport: asyncio.Transport) -> None:
        """Close it so that the client can read what it was sent."""
        if self._is_parting or transport.is_closing():
            return
        running = self._running
        if running and running.response_started and not running.response_complete:
            # The answer was left unfinished: a missing chunk tells that, or else only a reset.
            if running.chunked_encoding is False:
                transport.abort()
            else:
                transport.close()
        elif self._refused or self._in_body or (running and not running.keep_alive):
            self._is_parting = True
            if self._body_timer is not None:
                self._body_timer.cancel()
            self.flow.resume_reading()
            if transport.can_write_eof() and not self._is_half_closed:
                transport.write_eof()
            else:
                # Nothing more can come; or it is TLS, which does the same by itself.
                transport.close()
            if transport.get_write_buffer_size():
                self._watch_writing()
            else:
                self._say_goodbye()
        else:
            # It is idle: nothing can be lost.
            transport.close()

    def _say_goodbye(self) -> None:
        """Wait for the client's end; over TLS asyncio would do so for half a minute."""
        leaving = self._house.leaving
        leaving[self] = None
        if len(leaving) > _FAREWELLS:
            next(iter(leaving)).transport.abort()
        is_sending = self._in_body and not self._is_last
        if is_sending:
            self._body_timer = self.loop.call_later(
                self._settings.stall_timeout_s, self._cut, "body_discarded"
            )
        else:
            self.loop.call_later(_FAREWELL_S, self.transport.abort)

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > _MOST_DISCARDED:
            self._cut("body_discarded")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._settings.max_header_bytes:
            self._refuse_head()
            raise _Refused

    @property
    def _is_always_answered(self) -> bool:
        """Whether the request is answered also on connections above the limit."""
        path = self.url.partition(b"?")[0].decode("latin-1")
        return without_prefix(path, self._settings.root_path) in _ALWAYS_ANSWERED

    @property
    def _is_full(self) -> bool:
        """Whether the limit of connections is reached, without counting this one."""
        house = self._house
        held = len(self.connections) - len(house.leaving) - len(house.asked)
        return held > house.most - (self in house.asked)

    def _refuse_one_too_many(self) -> None:
        most = self._house.most
        self._refuse(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "too_many",
            f"The server has {most} connections, and holds no more. Try again in a second.",
        )

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            "head_too_large",
            f"Path and headers have more than the {self._settings.max_header_bytes} bytes that are"
            " allowed.",
        )

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self._settings.head_timeout_s, self._head_is_late
            )

    def _head_is_late(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_TIMEOUT,
            "head_timeout",
            f"No whole request came within {self._settings.head_timeout_s:g} s.",
        )

    def _watch_body(self) -> None:
        self._body_timer = self.loop.call_later(
            self._settings.stall_timeout_s, self._check_body, self._body_bytes
        )

    def _check_body(self, before: int) -> None:
        # While reading is paused the server itself wants no more.
        if not self.flow.read_paused and self._is_too_slow(self._body_bytes - before):
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                "body_too_slow",
                f"The body came slower than {self._settings.min_bytes_per_s} bytes a second for"
                f" {self._settings.stall_timeout_s:g} s.",
            )
        else:
            self._watch_body()

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._settings.stall_timeout_s,
                self._check_writing,
                self.transport.get_write_buffer_size(),
            )

    def _check_writing(self, before: int) -> None:
        self._write_timer = None
        left = self.transport.get_write_buffer_size()
        if not left:
            if self.transport.is_closing():
                self._say_goodbye()
            return
        # What is written meanwhile hides some of what was sent; but while writing is paused nothing
        # is, and where it was resumed the client does read. An answer that the application left off
        # is never complete, but the transport is closed then.
        if self._is_too_slow(before - left) and (
            self.flow.write_paused or self._is_answered or self.transport.is_closing()
        ):
            self._cut("answer_not_read")
        else:
            self._watch_writing()

    @property
    def _is_answered(self) -> bool:
        """Whether the whole last answer has been handed to the transport."""
        return self._request is None or self._request.response_complete

    @property
    def _request(self) -> RequestResponseCycle | None:
        # The last that came; those before it may not be answered yet. Of this type, whatever
        # uvicorn declares: there is none before the first.
        return self.cycle

    def _is_too_slow(self, transferred: int) -> bool:
        settings = self._settings
        return transferred < settings.min_bytes_per_s * settings.stall_timeout_s

    def _cut(self, reason: str) -> None:
        self._metrics.connections_refused.labels(reason).inc()
        self.transport.abort()

    def _hang_up(self) -> RequestResponseCycle | None:
        """Tell the request that is being answered, if any, that its client has left."""
        running = self._running
        if running is None or running.response_complete:
            return None
        running.disconnected = True
        running.message_event.set()
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
            self._refusal_timer = None
        return running

    def _drop_unfinished(self) -> RequestResponseCycle | None:
        """Forget an incomplete request; return the last complete one that has no answer."""
        if self.pipeline:
            if self._in_body and self.pipeline[0][0] is self._request:
                self.pipeline.popleft()
                self._in_body = False
        elif self._in_body:
            return None
        if self.pipeline:
            return self.pipeline[0][0]
        running = self._running
        return None if running is None or running.response_complete else running

    def _reject(self, status: HTTPStatus, reason: str, detail: str) -> NoReturn:
        """Refuse a request in the middle of parsing it."""
        self._refuse(status, reason, detail)
        raise _Refused

    def _refuse(self, status: HTTPStatus, reason: str, detail: str) -> None:
        """Answer with a problem document, then close; an incomplete request is over."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._house.asked.pop(self, None)
        self._metrics.connections_refused.labels(reason).inc()
        for timer in (self._head_timer, self._body_timer):
            if timer is not None:
                timer.cancel()
        body = json.dumps(
            {
                "type": "about:blank",
                "title": status.phrase,
                "status": status.value,
                "detail": detail,
            }
        ).encode()
        busy = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        retry = "Retry-After: 1\r\n" if busy else ""
        self._refusal = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {PROBLEM_JSON}\r\n"
            f"Content-Length: {len(body)}\r\n{retry}Cache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        ).encode() + body
        if self._in_body and self._is_answered:
            self.transport.close()
            return
        # With too many requests this answers them all; otherwise the answers that are due come
        # first.
        if status == HTTPStatus.TOO_MANY_REQUESTS or self._drop_unfinished() is None:
            running = self._hang_up()
            if running is not None and running.response_started:
                # Half an answer is sent: a second one would be taken for its rest.
                self.transport.abort()
                return
            self._send_refusal()

    def _send_refusal(self) -> None:
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        self.transport.write(self._refusal)
        self.transport.close()
