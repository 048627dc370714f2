"""Asks the application of this process, as if a request had come over HTTP.

So a call over gRPC passes the same layers as a request: key, rate, refusal, queue, deadline,
metrics, trace and log line. There is no second set of them that could differ.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message

from server.http.context import CAME

__all__ = ["Answer", "Bridge", "Refuses"]

Refuses = Callable[[Any], float | None]
"""`server.http.shedding.Door.refuses`"""


class Answer(NamedTuple):
    """What the application answered."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


class Bridge:
    """The way into the application.

    Args:
        app: the application, with all its layers.
        refuses: what a connection asks before it starts a task.
        tasks: requests at work; the process does not end before them.
        scheme: http, or https if the port speaks TLS.
    """

    def __init__(
        self, app: ASGIApp, refuses: Refuses, tasks: set[asyncio.Task[None]], scheme: str
    ) -> None:
        self._app = app
        self._refuses = refuses
        self._tasks = tasks
        self._scheme = scheme

    async def ask(
        self, method: str, path: str, headers: Iterable[tuple[str, str]] = (), body: bytes = b""
    ) -> Answer:
        """Ask, and wait for the whole answer.

        If the caller is cancelled the application learns that its client has gone, and drops the
        work before its next stage.

        Args:
            method: GET or POST.
            path: as it is sent, percent-encoded.
            headers: names in lower case.
            body: of the request.
        """
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "2",
            "method": method,
            "scheme": self._scheme,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                *((name.encode("latin-1"), value.encode("latin-1")) for name, value in headers),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": None,
            "server": None,
            "state": {CAME: time.perf_counter()},
        }
        if wait_s := self._refuses(scope):
            await asyncio.sleep(wait_s)
            self._refuses(scope)
        exchange = _Exchange(body)
        task = asyncio.get_running_loop().create_task(
            self._run(scope, exchange), name=f"rpc {path}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            exchange.gone.set()
            raise
        return exchange.answer()

    async def _run(self, scope: dict[str, Any], exchange: "_Exchange") -> None:
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer, as ASGI's two channels."""

    def __init__(self, body: bytes) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        self._status = 0
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []

    async def receive(self) -> Message:
        if self._body is not None:
            # From now on only the application has it.
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in message.get("headers", ())
            }
        else:
            self._parts.append(message.get("body", b""))

    def answer(self) -> Answer:
        # Without a status the application gave up: nobody waited for an answer any more.
        return Answer(self._status or 500, self._headers, b"".join(self._parts))
