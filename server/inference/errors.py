"""What can go wrong with a photo, a request or the network.

    Problem
    ├── BadRequest 400            malformed multipart, no image in the request
    ├── NotFound 404              nothing has that name
    ├── NotAcceptable 406         Accept rules out every form of the answer
    ├── TooLarge 413              more bytes or more pixels than allowed
    ├── UnsupportedType 415       a type of image or body that is not served
    ├── Unprocessable 422         an image that does not decode, a parameter out of range
    ├── Overloaded 429            queue full; carries Retry-After
    ├── InferenceFailed 500       the network failed on this photo, twice
    ├── Unavailable 503           not ready, or draining
    └── DeadlineExceeded 504      the request's deadline passed
    ClientGone                    the client hung up

They are raised where the cause is known. Each has its HTTP status, so that the two are one table;
`server.http.problems` turns them into answers.
"""

from collections.abc import Mapping
from http import HTTPStatus

from photos.image import ImageError as PhotoError
from photos.image import ImageTooLargeError, UnsupportedImageError

__all__ = [
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
    "of_photo_error",
]


class Problem(Exception):
    """A request that is answered with an error; `detail` says what its sender can do."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    reason = "failed"
    """Its label in the metrics."""

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
    """The client accepts none of the answer's media types."""

    status = HTTPStatus.NOT_ACCEPTABLE


class TooLarge(Problem):
    """More bytes or pixels than are allowed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    reason = "too_large"


class UnsupportedType(Problem):
    """The type of image or body is not served."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    reason = "unsupported_type"


class Unprocessable(Problem):
    """A photo does not decode, or a parameter is out of range."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    reason = "unprocessable"


class Overloaded(Problem):
    """The queue is full."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after_s: int, reason: str) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})
        self.reason = reason


class InferenceFailed(Problem):
    """The backend failed on this photo, in its batch and alone."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    reason = "inference_failed"


class Unavailable(Problem):
    """The server is not ready, or is shutting down."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    reason = "unavailable"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"Retry-After": "1"})


class DeadlineExceeded(Problem):
    """The request's deadline passed before its mask was ready."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    reason = "deadline"


class ClientGone(Exception):
    """The client hung up: its work is dropped, and no answer is sent."""


def of_photo_error(error: PhotoError) -> Problem:
    """The problem that tells the sender of a photo's error."""
    if isinstance(error, UnsupportedImageError):
        return UnsupportedType(str(error))
    if isinstance(error, ImageTooLargeError):
        return TooLarge(str(error))
    return Unprocessable(str(error))
