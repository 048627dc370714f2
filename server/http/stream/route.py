"""`/stream`: the handshake, and how many streams there may be."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from server.http.access import KEY
from server.http.errors import HttpProblem, TooManyRequests
from server.http.problems import accept_stream, end_stream
from server.http.stream.reference import Ready, asyncapi
from server.http.stream.session import Session
from server.http.stream.wishes import read_wishes
from server.inference.errors import Problem
from server.inference.service import Service

__all__ = ["stream_router"]

# The server goes down and comes back (IANA's registry of close codes).
_RESTARTS = 1012


class _NoWebSocket(HttpProblem):
    """The path is asked for over HTTP."""

    status = HTTPStatus.UPGRADE_REQUIRED
    reason = "no_websocket"

    def __init__(self) -> None:
        super().__init__(
            "Frames come over a WebSocket: GET /asyncapi.json says how.",
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )


def stream_router(service: Service, version: str) -> APIRouter:
    """The WebSocket `/stream`, and its reference."""
    router = APIRouter(include_in_schema=False)
    streams = _Streams(service)

    @router.websocket("/stream")
    async def stream(websocket: WebSocket) -> None:
        session: Session | None = None
        try:
            wishes = read_wishes(websocket, service.settings)
            service.check_ready(wishes.model)
            with streams.place(getattr(websocket.state, KEY, None)):
                await accept_stream(websocket)
                ready = Ready.of(websocket.state.request_id, wishes, service.settings)
                await websocket.send_text(ready.model_dump_json())
                session = Session(service, websocket, wishes)
                await session.run()
                if service.drain.begun:
                    service.check_ready()
        except WebSocketDisconnect:
            pass
        except Problem as problem:
            dropped = session.dropped if session else 0
            code = _RESTARTS if session and service.drain.begun else None
            await end_stream(websocket, problem, code=code, dropped=dropped)

    @router.get("/stream")
    async def stream_over_http() -> Response:
        raise _NoWebSocket

    @router.get("/asyncapi.json")
    async def reference(request: Request) -> Response:
        return JSONResponse(asyncapi(request.url, version))

    return router


class _Streams:
    """The streams that are open."""

    def __init__(self, service: Service) -> None:
        self._most = service.settings.streams
        self._most_of_key = service.settings.key_streams
        self._open: Counter[bytes | None] = Counter()
        """Streams of each key."""
        service.metrics.observe(service.metrics.streams, self._open.total)

    @contextlib.contextmanager
    def place(self, key: bytes | None) -> Iterator[None]:
        """Count one more during the block.

        Args:
            key: digest of the API key that it is for, if there are keys.

        Raises:
            TooManyRequests: there are as many as may be, of this key or in all.
        """
        if self._most_of_key and key is not None and self._open[key] >= self._most_of_key:
            raise TooManyRequests(
                f"This key has {self._most_of_key} streams, as many as it may. Close one, or try"
                " again in a second.",
                1,
                "key_streams",
            )
        if self._open.total() >= self._most:
            raise TooManyRequests(
                f"The server has {self._most} streams, and no room for another. Try again in a"
                " second.",
                1,
                "too_many_streams",
            )
        self._open[key] += 1
        try:
            yield
        finally:
            # This keeps no key whose count is 0.
            self._open -= Counter([key])
