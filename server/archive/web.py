"""HTTP requests whose answers are bounded and whose failures have names."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from server.archive.failures import Failure

__all__ = ["Answer", "Web", "refused"]

# Seconds to connect, and within which some of the answer has to come.
_CONNECT_S = 10

# Times `timeout_s` for an answer as a whole: one that comes by drops would hold a worker for ever.
_WHOLE = 10

# An answer that asks for more is asked sooner.
_LONGEST_RETRY_AFTER_S = 600.0

# Statuses that the same request would get again: it is the object that is refused.
_OF_THE_OBJECT = (400, 406, 409, 411, 413, 414, 415, 422)


@dataclass(frozen=True)
class Answer:
    """An answer, whole."""

    status: int
    headers: httpx.Headers
    content: bytes


class Web:
    """Asks one web server.

    Args:
        name: what it is called in failures, such as `archive`.
        url: its address, which paths are relative to.
        headers: of every request.
        timeout_s: seconds within which it has to say something; ten times so many for all of it.
        max_bytes: largest answer.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        max_bytes: int = 512 << 20,
    ) -> None:
        self._name = name
        self._max_bytes = max_bytes
        self._whole_s = _WHOLE * timeout_s
        # Neither a proxy nor a password file of this machine. SSL_CERT_FILE names other
        # authorities.
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=dict(headers or {}),
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            verify=ssl.create_default_context(),
            trust_env=False,
        )

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        """The answer, of any status.

        Raises:
            Failure: none came, or too large a one.
        """
        try:
            async with (
                asyncio.timeout(self._whole_s),
                self._http.stream(
                    method, path, params=query, headers=headers, content=content
                ) as answer,
            ):
                chunks, size = [], 0
                async for chunk in answer.aiter_bytes():
                    size += len(chunk)
                    if size > self._max_bytes:
                        raise Failure(
                            "answer_too_large",
                            f"The {self._name}'s answer has more than {self._max_bytes} bytes.",
                            final=True,
                        )
                    chunks.append(chunk)
                return Answer(answer.status_code, answer.headers, b"".join(chunks))
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Failure("timeout", f"The {self._name} is too slow.") from error
        except httpx.HTTPError as error:
            raise Failure(
                "unreachable", f"The {self._name} is not reached: {type(error).__name__}."
            ) from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def refused(name: str, answer: Answer, detail: str = "") -> Failure:
    """The failure that an answer without success means.

    Args:
        name: of who answered.
        answer: its status is none of success.
        detail: what it says, if that is to be trusted.
    """
    status = answer.status
    said = f"The {name} answers {status}{': ' + detail if detail else ''}."
    if status in (401, 403):
        return Failure("key_refused", said)
    if status in (408, 425, 429, 503, 504):
        return Failure("busy", said, retry_after_s=_retry_after_s(answer.headers))
    if status in _OF_THE_OBJECT:
        return Failure("refused", said, final=True)
    if 300 <= status < 400:
        return Failure("redirected", f"{said} Name the address that it redirects to.")
    # Also 404: the address may be wrong, which is no fault of the object.
    return Failure("failed" if status >= 500 else "wrong_address", said)


def _retry_after_s(headers: httpx.Headers) -> float:
    said = headers.get("Retry-After", "")
    return min(float(said), _LONGEST_RETRY_AFTER_S) if said.isdigit() else 0.0
