"""Errors as answers: all RFC 9457 problem details are made here.

`install` does so for the errors of `server.inference.errors`, of `server.http.errors` and of the
framework. Over a WebSocket they are messages (`error_message`), and the last one ends it
(`end_stream`). `told` is the one place that knows with which status, and with which advice, an
error of the inference is told.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from server.http.errors import HttpProblem
from server.inference.admission import WOULD_BE_LATE
from server.inference.errors import (
    ClientGone,
    DeadlineExceeded,
    GoingDown,
    InferenceFailed,
    Overloaded,
    Problem,
    TooLarge,
    Unavailable,
    UnknownNetwork,
    Unprocessable,
    UnsupportedType,
)

__all__ = [
    "EXAMPLES",
    "PROBLEM_JSON",
    "STREAM_PROTOCOL",
    "Told",
    "accept_stream",
    "answer",
    "answer_problem",
    "document",
    "end_stream",
    "error_message",
    "install",
    "of_invalid",
    "told",
]

PROBLEM_JSON = "application/problem+json"

STREAM_PROTOCOL = "slsnet.v1"
"""The subprotocol of `/stream`. Browsers give up where the server takes none that they offer."""

# A close frame has room for so many bytes of a reason (RFC 6455, 5.5).
_MAX_REASON = 123

# Codes from here on are an application's own (RFC 6455, 7.4.2): an HTTP status follows.
_FIRST_CODE = 4000

_TOLD: dict[type[Problem], tuple[HTTPStatus, str]] = {
    Problem: (HTTPStatus.INTERNAL_SERVER_ERROR, ""),
    TooLarge: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, ""),
    UnsupportedType: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, ""),
    Unprocessable: (HTTPStatus.UNPROCESSABLE_ENTITY, ""),
    UnknownNetwork: (HTTPStatus.NOT_FOUND, ""),
    Overloaded: (
        HTTPStatus.TOO_MANY_REQUESTS,
        " Try again in about {retry_after_s} s (Retry-After).",
    ),
    InferenceFailed: (
        HTTPStatus.INTERNAL_SERVER_ERROR,
        " Trying again later may work; if it does not, report the request_id.",
    ),
    Unavailable: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        " Try again when GET {ready} answers 200.",
    ),
    GoingDown: (HTTPStatus.SERVICE_UNAVAILABLE, ""),
    DeadlineExceeded: (
        HTTPStatus.GATEWAY_TIMEOUT,
        " Send it again when the server is less busy, or allow more time with {deadline}.",
    ),
}
"""Status of each error of the inference, and what its sender can do."""


@dataclass(frozen=True)
class Told:
    """A problem as HTTP tells it."""

    status: HTTPStatus
    detail: str
    headers: Mapping[str, str]


def told(problem: Problem, deadline: str = "X-Request-Timeout-Ms") -> Told:
    """The status of a problem, its whole text and its headers; `deadline` names what sets it."""
    if isinstance(problem, HttpProblem):
        return Told(problem.status, problem.detail, problem.headers)
    status, advice = next(_TOLD[kind] for kind in type(problem).__mro__ if kind in _TOLD)
    detail, headers = problem.detail, {}
    if isinstance(problem, Overloaded):
        headers = {"Retry-After": str(problem.retry_after_s)}
        advice = advice.format(retry_after_s=problem.retry_after_s)
        if problem.reason == WOULD_BE_LATE:
            detail = f"{detail.removesuffix('.')} ({deadline})."
    elif isinstance(problem, DeadlineExceeded):
        advice = advice.format(deadline=deadline)
    elif isinstance(problem, Unavailable):
        advice = advice.format(ready=problem.ready)
        headers = {"Retry-After": "1"}
    return Told(status, detail + advice, headers)


EXAMPLES: dict[int, str] = {
    int(said.status): said.detail
    for said in (
        told(Overloaded("The server is busy: the queue is full.", 3, "queue_full")),
        told(InferenceFailed("The network failed on this photo twice.")),
        told(Unavailable("The network is still being loaded.")),
        told(DeadlineExceeded("The deadline passed before the photo reached the network.")),
    )
}
"""A text for each status that the inference causes, for the API's document."""


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return answer_problem(request, error)

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
        return answer_problem(request, Unprocessable(of_invalid(error.errors())))

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
        # Behind where it is and its name stands which of a parameter's types it is not.
        f"{'.'.join(map(str, item['loc'][:2]))}: {item['msg']}, got {str(item['input'])[:80]!r}"
        for item in errors
        # A parameter that may be left out has None for a type, which nobody can send.
        if item["type"] != "none_required"
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


def answer_problem(request: Request, problem: Problem) -> Response:
    """The answer that tells `problem`; its reason goes to the metrics."""
    request.state.reason = problem.reason
    said = told(problem)
    return answer(request, said.status, said.detail, said.headers)


def error_message(
    websocket: WebSocket, problem: Problem, *, frame: int | None = None, dropped: int = 0
) -> str:
    """A problem of one frame as a message in JSON; without a frame it ends the stream."""
    said = told(problem, "deadline_ms")
    retry_after = said.headers.get("Retry-After")
    error = document(said.status, said.detail, websocket.scope["path"], _request_id(websocket))
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
    said = told(problem)
    if code is None:
        websocket.state.reason, websocket.state.status = problem.reason, said.status
    reason = said.detail.encode()[:_MAX_REASON].decode(errors="ignore")
    with contextlib.suppress(WebSocketDisconnect):
        if websocket.application_state is WebSocketState.CONNECTING:
            await accept_stream(websocket)
        await websocket.send_text(error_message(websocket, problem, dropped=dropped))
        await websocket.close(code or _FIRST_CODE + said.status, reason)
