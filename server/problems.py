"""What can go wrong with a request, and how it is told: RFC 9457 problem details.

    Problem
    ├── BadRequest 400            malformed multipart, no image in the request
    ├── NotFound 404              nothing has that name
    ├── NotAcceptable 406         Accept rules out all that there is
    ├── TooLarge 413              more bytes or more pixels than allowed
    ├── UnsupportedType 415       not a type that is served
    ├── Unprocessable 422         an image that does not decode, a parameter out of range
    ├── Overloaded 429            queue full; carries Retry-After
    ├── InferenceFailed 500       the network failed on this image, twice
    ├── Unavailable 503           not ready, or draining
    └── DeadlineExceeded 504      the request's deadline passed
    ClientGone                    nobody is there to be told

They are raised where the cause is known; `install` turns them, and everything that the framework
itself refuses, into answers in one place.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from model.image import ImageError as PhotoError
from model.image import ImageTooLargeError, UnsupportedImageError

__all__ = [
    "PROBLEM_JSON",
    "BadRequest",
    "ClientGone",
    "DeadlineExceeded",
    "InferenceFailed",
    "NotAcceptable",
    "NotFound",
    "Overloaded",
    "Problem",
    "TooLarge",
    "Unavailable",
    "Unprocessable",
    "UnsupportedType",
    "answer",
    "document",
    "install",
    "of_photo_error",
]

PROBLEM_JSON = "application/problem+json"


class Problem(Exception):
    """A request that gets an error for an answer; `detail` says what its sender can do."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    reason = "failed"
    """In the metrics."""

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.headers = dict(headers or {})


class BadRequest(Problem):
    """The request holds no image, or its form is malformed."""

    status = HTTPStatus.BAD_REQUEST
    reason = "bad_request"


class NotFound(Problem):
    """Nothing has that name."""

    status = HTTPStatus.NOT_FOUND
    reason = "not_found"


class NotAcceptable(Problem):
    """The client wants none of the media types that there are."""

    status = HTTPStatus.NOT_ACCEPTABLE


class TooLarge(Problem):
    """More bytes or pixels than are allowed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    reason = "too_large"


class UnsupportedType(Problem):
    """Not a type of image, or of body, that is served."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    reason = "unsupported_type"


class Unprocessable(Problem):
    """An image that does not decode, or a parameter out of range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    reason = "unprocessable"


class Overloaded(Problem):
    """The queue is full."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after_s: int, reason: str) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})
        self.reason = reason


class InferenceFailed(Problem):
    """The backend failed on this image, in its batch and alone."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    reason = "inference_failed"


class Unavailable(Problem):
    """Not ready to serve."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    reason = "unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"Retry-After": "1"})


class DeadlineExceeded(Problem):
    """The request's deadline passed before its mask was ready."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    reason = "deadline"


class ClientGone(Exception):
    """The client hung up: its work is dropped, and there is nobody to answer."""


def of_photo_error(error: PhotoError) -> Problem:
    """The problem that a photo's error is to its sender."""
    if isinstance(error, UnsupportedImageError):
        return UnsupportedType(str(error))
    if isinstance(error, ImageTooLargeError):
        return TooLarge(str(error))
    return Unprocessable(str(error))


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
            # What takes GET takes HEAD: see `RequestContext`.
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
        # Never sent: the connection is closed. The status is what proxies log for this.
        return Response(status_code=499)

    async def failed(request: Request, _error: Exception) -> Response:
        request.state.reason = Problem.reason
        # Logged by `RequestContext`, to which the framework passes it on.
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
    """A problem as JSON's members (RFC 9457, 3.1)."""
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
    """A problem document that says `detail`; under `/v2` an error of the protocol spoken there."""
    # Not `request.url`, which takes as long to make as all the rest.
    path: str = request.scope["path"]
    if f"{path}/".startswith("/v2/"):
        return JSONResponse({"error": detail}, status, headers)
    body = document(status, detail, path, _request_id(request))
    return JSONResponse(body, status, headers, media_type=PROBLEM_JSON)
