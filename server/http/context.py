"""The layer around every request: its id, its stopwatch, its security headers and its log line.

The id is made here, in three lines: asgi-correlation-id would be one more layer, and traces and the
request's state need the id from here in any case.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.observe.tracing import Record

__all__ = ["CAME", "REQUEST_ID", "RequestContext"]

log = logging.getLogger("slsnet.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""The form of a client's own request id: it is echoed, and written to the log."""

CAME = "came"
"""Key in a request's state: when its head came, second of `time.perf_counter`, if known."""

# Messages that begin an answer.
_BEGINNINGS = ("http.response.start", "websocket.accept")

_SWITCHED = 101
"""Status of a WebSocket, unless its end has another."""

# For every answer that does not set its own; only the pages do.
_SECURITY = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class RequestContext:
    """ASGI layer around the whole application, errors included.

    Puts `request_id` and `stages` into the request's state. Every answer has `X-Request-ID`,
    `Server-Timing` and security headers. While the server drains it also has `Connection: close`,
    so that clients go to another server. A WebSocket is counted and logged when it is over.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        is_draining: Callable[[], bool],
        *,
        encrypted: bool = False,
        shared: bool = False,
        record: Record | None = None,
    ) -> None:
        """Surround `app`.

        Args:
            app: the application inside.
            metrics: count every answer.
            is_draining: whether the server is shutting down.
            encrypted: tell browsers to use TLS only.
            shared: pages of other origins may use the API.
            record: writes traces.
        """
        self._app = app
        security = dict(_SECURITY)
        if encrypted:
            security["Strict-Transport-Security"] = "max-age=31536000"
        if shared:
            security["Cross-Origin-Resource-Policy"] = "cross-origin"
        self._security = [(k.lower().encode(), v.encode()) for k, v in security.items()]
        self._metrics = metrics
        self._is_draining = is_draining
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        method = scope.get("method", "GET")
        if method == "HEAD":
            # Each GET has a HEAD (RFC 9110, 9.1). Uvicorn leaves its body out.
            scope = {**scope, "method": "GET"}
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        stages = Stages(state.get(CAME))
        state["request_id"] = request_id
        state["stages"] = stages
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] in _BEGINNINGS:
                status = message.get("status", _SWITCHED)
                message["headers"] = self._headers(message, request_id, stages)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # It was answered with 500, unless an answer had begun. It has not been logged yet.
            log.exception("request %s failed", request_id)
        status = state.get("status", status)
        # Only paths that exist become label values, so that a scanner cannot grow the metrics.
        path = getattr(scope.get("route"), "path", "other")
        reason = state.get("reason", "") if status >= 400 else ""
        self._count(stages, path, status, reason)
        if self._record is not None:
            attributes: dict[str, str | int] = {
                "http.request.method": method,
                "http.route": path,
                "http.response.status_code": status,
                "slsnet.request_id": request_id,
            }
            self._record(stages, Headers(scope=scope), f"{method} {path}", attributes)
        if log.isEnabledFor(logging.INFO):
            _log(stages, request_id, state.get("client", "-"), method, path, status, reason)

    def _headers(
        self, message: Message, request_id: str, stages: Stages
    ) -> list[tuple[bytes, bytes]]:
        # `MutableHeaders` would search all headers for each.
        given = list(message.get("headers", ()))
        names = {name for name, _ in given}
        if message["type"] == "websocket.accept":
            return [*given, (b"x-request-id", request_id.encode())]
        return [
            *given,
            (b"x-request-id", request_id.encode()),
            (b"server-timing", stages.header().encode()),
            *(header for header in self._security if header[0] not in names),
            *([(b"connection", b"close")] if self._is_draining() else []),
        ]

    def _count(self, stages: Stages, path: str, status: int, reason: str) -> None:
        self._metrics.requests.labels(path, str(status), reason).inc()
        for stage, seconds in stages.seconds.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        if "infer" in stages.seconds or status == 504:
            # Refusals are left out: they are quick, and tell nothing of the time to a mask.
            self._metrics.request_seconds.labels(path).observe(time.perf_counter() - stages.started)


def _log(
    stages: Stages, request_id: str, client: str, method: str, path: str, status: int, reason: str
) -> None:
    log.info(
        "%s %s %s %s %d %s",
        request_id,
        client,
        method,
        path,
        status,
        stages.header(),
        extra={
            "fields": {
                "request_id": request_id,
                "client": client,
                "method": method,
                "path": path,
                "status": status,
                "reason": reason,
                "stages_ms": stages.milliseconds(),
                "total_ms": round((time.perf_counter() - stages.started) * 1000, 3),
                **stages.notes,
            }
        },
    )
