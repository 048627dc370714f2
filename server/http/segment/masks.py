"""A photo's answer in the form that was asked for."""

import contextlib
from dataclasses import dataclass

from server.http.answers import MaskFormat, json_answer, png_answer, probability_bytes
from server.inference.submission import Segmentation, Work

__all__ = ["JSON", "PNG", "Asked", "encoded"]

PNG = "image/png"
JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    """The form of answer for every photo of a request."""

    threshold: float
    original: bool
    """Whether the mask has the photo's size."""
    clean: bool
    mask: MaskFormat
    is_json: bool
    """Whether the answer is JSON; otherwise it is PNG."""
    request_id: str


async def encoded(
    work: Work, segmentation: Segmentation, asked: Asked, held: contextlib.ExitStack
) -> bytes:
    """The bytes of a photo's answer.

    Args:
        work: the work that the photo belongs to.
        segmentation: the photo's.
        asked: the form of the answer.
        held: gets the budget's bytes of a large answer, to give them back once it is sent.

    Raises:
        Overloaded: there is no room for a large answer.
    """
    threshold, original, clean = asked.threshold, asked.original, asked.clean
    if not asked.is_json:
        return await work.encode(
            lambda: png_answer(segmentation, threshold, original, clean=clean),
            here=segmentation.is_small and not clean and not work.bulk,
        )
    size = probability_bytes(segmentation, original, asked.mask)
    held.enter_context(work.service.gate.answer_bytes(size, bulk=work.bulk))
    return await work.encode(
        lambda: json_answer(
            segmentation,
            threshold,
            original,
            asked.mask,
            clean=clean,
            request_id=asked.request_id,
            timings_ms=work.stages.milliseconds(),
            room=work.service.pixels.room,
        )
    )
