"""What a request may ask for beside its photo: query and headers that several paths share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Literal

from fastapi import Header, Query

from server.answers import MaskFormat
from server.problems import DeadlineExceeded

__all__ = [
    "MaskForm",
    "MaskSize",
    "Priority",
    "Threshold",
    "TimeoutMs",
    "deadline",
    "is_bulk",
    "preferred",
]

Threshold = Annotated[
    float,
    Query(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="lesion is where the probability is above it",
    ),
]

MaskSize = Annotated[
    Literal["original", "model"],
    Query(description="of the mask: the photo's, or the network's 128×128"),
]

MaskForm = Annotated[MaskFormat, Query(description="how a JSON answer holds the mask")]

TimeoutMs = Annotated[
    float | None,
    Header(
        gt=0,
        allow_inf_nan=False,
        description="milliseconds within which the answer is of use; more than the server's own"
        " limit means that limit",
    ),
]

Priority = Annotated[
    str,
    Header(
        description="`bulk` lets requests that do not say so go first",
        examples=["bulk"],
    ),
]


def is_bulk(priority: str) -> bool:
    """Whether a `Priority` header says `bulk`, alone or in a list (RFC 9218, 4)."""
    return any(entry.partition(";")[0].strip().lower() == "bulk" for entry in priority.split(","))


@contextlib.asynccontextmanager
async def deadline(
    timeout_s: float, *, spent_s: float = 0
) -> AsyncIterator[Callable[[float], None]]:
    """What is inside has this long; gives what sets it to fewer seconds, counted from the start.

    Args:
        timeout_s: that the request has.
        spent_s: of these already.

    Raises:
        DeadlineExceeded: it took longer.
    """
    now = asyncio.get_running_loop().time
    started = now() - spent_s
    try:
        async with asyncio.timeout(timeout_s - spent_s) as limit:

            def shorten(seconds: float) -> None:
                nonlocal timeout_s
                timeout_s = seconds
                limit.reschedule(started + seconds)

            yield shorten
    except TimeoutError:
        raise DeadlineExceeded(
            f"The deadline of {timeout_s * 1000:g} ms passed before the answer was ready. Send it"
            " again when the server is less busy, or allow more time with X-Request-Timeout-Ms."
        ) from None


def preferred(accept: str, offers: Sequence[str]) -> str:
    """Which of `offers` an `Accept` header prefers (RFC 9110, 12.5.1); the first if it is equal."""
    qualities: dict[str, float] = {}
    for entry in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            qualities[media_type] = float(quality)
        except ValueError:
            qualities[media_type] = 0

    def quality_of(offer: str) -> float:
        group = offer.partition("/")[0]
        return next((qualities[key] for key in (offer, f"{group}/*", "*/*") if key in qualities), 0)

    return max(offers, key=quality_of)
