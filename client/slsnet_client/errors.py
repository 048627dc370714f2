"""What can go wrong between client and server, as one small tree."""

from typing import Any

__all__ = [
    "DeadlinePassed",
    "KeyRefused",
    "RequestRefused",
    "ServerBusy",
    "ServerFailed",
    "SlsnetError",
    "Unreachable",
    "error_of",
]


class SlsnetError(Exception):
    """Any of them. What the server's problem document says is in its attributes."""

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        title: str = "",
        type: str = "about:blank",  # noqa: A002 - as the document calls it
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        """Of HTTP; None where no answer came."""
        self.title = title
        self.type = type
        self.request_id = request_id
        """Finds the line in the server's log."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server wants to be asked again, if it said so."""

    def __str__(self) -> str:
        about = [f"status {self.status}"] if self.status else []
        about += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.detail} ({', '.join(about)})" if about else self.detail


class KeyRefused(SlsnetError):
    """There is no API key, or it does not open this server (401, 403)."""


class RequestRefused(SlsnetError):
    """The photo or a parameter is wrong; the same request will be refused again (other 4xx)."""


class ServerBusy(SlsnetError):
    """The server is full, or does not take requests now (429, 503)."""


class DeadlinePassed(SlsnetError):
    """The answer did not come in time (504, 408, or the client's own clock)."""


class ServerFailed(SlsnetError):
    """The server failed, or something else than an SLSNet Server answered."""


class Unreachable(SlsnetError):
    """No connection, or it was lost before the answer was whole."""


_BY_STATUS: dict[int, type[SlsnetError]] = {
    401: KeyRefused,
    403: KeyRefused,
    408: DeadlinePassed,
    429: ServerBusy,
    503: ServerBusy,
    504: DeadlinePassed,
}


def error_of(
    status: int, document: Any, request_id: str | None, retry_after_s: float | None
) -> SlsnetError:
    """The error that an answer means.

    Args:
        status: of the answer.
        document: its JSON; anything else than an object, if there is no problem document.
        request_id: of the answer's headers, or the client's own.
        retry_after_s: what `Retry-After` says.
    """
    kind = _BY_STATUS.get(status, RequestRefused if 400 <= status < 500 else ServerFailed)
    said = document if isinstance(document, dict) else {}
    return kind(
        str(said.get("detail") or f"The server answered with status {status}."),
        status=status,
        title=str(said.get("title", "")),
        type=str(said.get("type", "about:blank")),
        request_id=str(said.get("request_id") or request_id or "") or None,
        retry_after_s=retry_after_s,
    )
