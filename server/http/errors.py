"""What is wrong with a request that `server.inference` never sees.

    HttpProblem
    ├── BadRequest 400         malformed multipart, no image in the request
    ├── Unauthorized 401       no API key, or an unknown one
    ├── Forbidden 403          the key does not open this path
    ├── NotFound 404           nothing has that name
    ├── NotAcceptable 406      Accept rules out every form of the answer
    ├── BodyEncoded 415        the body's Content-Encoding is not served
    └── TooManyRequests 429    a limit of HTTP's own, beside those of admission

`server.http.problems` tells them and the errors of `server.inference.errors`.
"""

from collections.abc import Mapping
from http import HTTPStatus

from server.inference.errors import Problem, UnsupportedType

__all__ = [
    "BadRequest",
    "BodyEncoded",
    "Forbidden",
    "HttpProblem",
    "NotAcceptable",
    "NotFound",
    "TooManyRequests",
    "Unauthorized",
]


class HttpProblem(Problem):
    """A problem with its status, and with what its sender can do in its text."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.headers = dict(headers or {})


class BadRequest(HttpProblem):
    """The request holds no image, or its form is malformed."""

    reason = "bad_request"


class Unauthorized(HttpProblem):
    """The request has no key, or an unknown one."""

    status = HTTPStatus.UNAUTHORIZED
    reason = "unauthorized"

    def __init__(self, detail: str) -> None:
        # Basic makes a browser ask for the key by itself. Chromium looks at the first scheme only.
        challenge = 'Basic realm="slsnet", charset="UTF-8", Bearer realm="slsnet"'
        super().__init__(detail, {"WWW-Authenticate": challenge})


class Forbidden(HttpProblem):
    """The key does not open this path."""

    status = HTTPStatus.FORBIDDEN
    reason = "forbidden"


class NotFound(HttpProblem):
    """Nothing has that name."""

    status = HTTPStatus.NOT_FOUND
    reason = "not_found"


class NotAcceptable(HttpProblem):
    """The client accepts none of the answer's media types."""

    status = HTTPStatus.NOT_ACCEPTABLE


class BodyEncoded(HttpProblem):
    """The body's Content-Encoding is not served."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    reason = UnsupportedType.reason


class TooManyRequests(HttpProblem):
    """A limit of HTTP's own is reached."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after_s: int, reason: str) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})
        self.reason = reason
