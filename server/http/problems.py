"""Errors as answers: all RFC 9457 problem details are made here.

`install` does so for the errors of `server.inference.errors` and those of the framework. Over a
WebSocket they are messages (`error_message`), and the last one ends it (`end_stream`).
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from server.inference.errors import ClientGone, Problem, Unprocessable

__all__ = [
    "PROBLEM_JSON",
    "STREAM_PROTOCOL",
    "accept_stream",
    "answer",
    "document",
    "end_stream",
    "error_message",
    "install",
    "of_invalid",
]

PROBLEM_JSON = "application/problem+json"

STREAM_PROTOCOL = "slsnet.v1"
"""The subprotocol of `/stream`. Browsers give up where the server takes none that they offer."""

# A close frame has room for so many bytes of a reason (RFC 6455, 5.5).
_MAX_REASON = 123

# Codes from here on are an application's own (RFC 6455, 7.4.2): an HTTP status follows.
_FIRST_CODE = 4000


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        request.state.reason = error.reason
        return answer(request, error.status, error.detail, error.headers)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.NOT_FOUND:
            path = request.url.path
            detail = f"There is nothing at {path}."
            if path.endswith("/"):
                detail += f" Paths have no slash at their end: try {path.rstrip('/') or '/'}."
            detail += " Photos go to POST /segment; GET /docs lists everything else."
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # A path that takes GET takes HEAD: see `RequestContext`.
            headers["Allow"] = headers["Allow"].replace("GET", "GET, HEAD")
            detail = f"{request.url.path} does not take {request.method}: use {headers['Allow']}."
        return answer(request, HTTPStatus(error.status_code), detail, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        request.state.reason = Unprocessable.reason
        return answer(request, Unprocessable.status, of_invalid(error.errors()), None)

    async def gone(request: Request, _error: Exception) -> Response:
        request.state.reason = "client_gone"
        # It is never sent, since the connection is closed. Proxies log this status for that.
        return Response(status_code=499)

    async def failed(request: Request, _error: Exception) -> Response:
        request.state.reason = Problem.reason
        # The framework passes it on to `RequestContext`, which logs it.
        return answer(
            request,
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "The server failed on this request. Trying again may work; if it does not, report the"
            " request_id.",
            None,
        )

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, failed)


def of_invalid(errors: Iterable[Any]) -> str:
    """What is wrong with parameters, from pydantic's errors."""
    details = [
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']},"
        f" got {str(item['input'])[:80]!r}"
        for item in errors
    ]
    return "; ".join(details) + "."


def _request_id(request: HTTPConnection) -> str | None:
    return getattr(request.state, "request_id", None)


def document(
    status: HTTPStatus, detail: str, instance: str, request_id: str | None
) -> dict[str, Any]:
    """The members of a problem in JSON (RFC 9457, 3.1)."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": detail,
        "instance": instance,
    }
    if request_id:
        body["request_id"] = request_id
    return body


def answer(
    request: HTTPConnection,
    status: HTTPStatus,
    detail: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem document with `detail`; under `/v2` an error of the Open Inference Protocol."""
    # `request.url` would take as long to make as all the rest.
    path: str = request.scope["path"]
    if f"{path}/".startswith("/v2/"):
        return JSONResponse({"error": detail}, status, headers)
    body = document(status, detail, path, _request_id(request))
    return JSONResponse(body, status, headers, media_type=PROBLEM_JSON)


def error_message(
    websocket: WebSocket, problem: Problem, *, frame: int | None = None, dropped: int = 0
) -> str:
    """A problem of one frame as a message in JSON; without a frame it ends the stream."""
    retry_after = problem.headers.get("Retry-After")
    error = document(
        problem.status, problem.detail, websocket.scope["path"], _request_id(websocket)
    )
    return json.dumps(
        {
            "type": "error",
            "frame": frame,
            "dropped": dropped,
            "retry_after_s": None if retry_after is None else int(retry_after),
            "error": error,
        }
    )


async def accept_stream(websocket: WebSocket) -> None:
    """Finish the handshake."""
    offered = websocket.scope.get("subprotocols", ())
    await websocket.accept(STREAM_PROTOCOL if STREAM_PROTOCOL in offered else None)


async def end_stream(
    websocket: WebSocket, problem: Problem, *, code: int | None = None, dropped: int = 0
) -> None:
    """Say what is wrong, then close with `code`, or 4000 and the HTTP status.

    It is said in a message, also where the handshake could be refused: a browser shows its page
    nothing of such a refusal.
    """
    if code is None:
        websocket.state.reason, websocket.state.status = problem.reason, problem.status
    reason = problem.detail.encode()[:_MAX_REASON].decode(errors="ignore")
    with contextlib.suppress(WebSocketDisconnect):
        if websocket.application_state is WebSocketState.CONNECTING:
            await accept_stream(websocket)
        await websocket.send_text(error_message(websocket, problem, dropped=dropped))
        await websocket.close(code or _FIRST_CODE + problem.status, reason)
