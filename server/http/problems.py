"""Errors as answers: all RFC 9457 problem details are made here.

`install` does so for the errors of `server.inference.errors` and those of the framework.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from server.inference.errors import ClientGone, Problem, Unprocessable

__all__ = ["PROBLEM_JSON", "answer", "document", "install"]

PROBLEM_JSON = "application/problem+json"


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
        details = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']},"
            f" got {str(item['input'])[:80]!r}"
            for item in error.errors()
        ]
        return answer(request, Unprocessable.status, "; ".join(details) + ".", None)

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


def _request_id(request: Request) -> str | None:
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
    request: Request, status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem document with `detail`; under `/v2` an error of the Open Inference Protocol."""
    # `request.url` would take as long to make as all the rest.
    path: str = request.scope["path"]
    if f"{path}/".startswith("/v2/"):
        return JSONResponse({"error": detail}, status, headers)
    body = document(status, detail, path, _request_id(request))
    return JSONResponse(body, status, headers, media_type=PROBLEM_JSON)
