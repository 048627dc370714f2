"""What can go wrong with a photo, in the queue or in the network.

    Problem
    ├── TooLarge            more bytes or more pixels than allowed
    ├── UnsupportedType     a type of image that is not served
    ├── Unprocessable       an image that does not decode
    ├── Overloaded          no room, or it would be done too late
    ├── InferenceFailed     the network failed on this photo, in its batch and alone
    ├── Unavailable         the network is being loaded, or keeps failing
    │   └── GoingDown       the process ends
    └── DeadlineExceeded    the deadline passed before the photo was done
    ClientGone              nobody waits for the answer

They say what happened. What their sender can do about it is said where they are told: over HTTP in
`server.http.problems`.
"""

from photos.image import ImageError as PhotoError
from photos.image import ImageTooLargeError, UnsupportedImageError

__all__ = [
    "ClientGone",
    "DeadlineExceeded",
    "GoingDown",
    "InferenceFailed",
    "Overloaded",
    "Problem",
    "TooLarge",
    "Unavailable",
    "UnknownNetwork",
    "Unprocessable",
    "UnsupportedType",
    "of_photo_error",
]


class Problem(Exception):
    """A request that cannot be served; `detail` says why, in whole sentences."""

    reason = "failed"
    """Its label in the metrics."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class TooLarge(Problem):
    """More bytes or pixels than are allowed."""

    reason = "too_large"


class UnsupportedType(Problem):
    """The type of image or body is not served."""

    reason = "unsupported_type"


class Unprocessable(Problem):
    """A photo does not decode, or a parameter is out of range."""

    reason = "unprocessable"


class UnknownNetwork(Problem):
    """No network that serves has the name."""

    reason = "not_found"


class Overloaded(Problem):
    """There is no room, or the photos would be done too late."""

    def __init__(self, detail: str, retry_after_s: int, reason: str) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s
        """Seconds until it may be worth trying again."""
        self.reason = reason


class InferenceFailed(Problem):
    """The backend failed on this photo, in its batch and alone."""

    reason = "inference_failed"


class Unavailable(Problem):
    """The network is being loaded, or keeps failing; the path `ready` tells when it works."""

    reason = "unavailable"

    def __init__(self, detail: str, ready: str = "/health/ready") -> None:
        super().__init__(detail)
        self.ready = ready


class GoingDown(Unavailable):
    """The process ends."""


class DeadlineExceeded(Problem):
    """The request's deadline passed before its mask was ready."""

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
