"""What is asked for of a photo's mask, and the bytes that it becomes."""

import contextlib
from dataclasses import dataclass

from server.http.answers import MaskFormat, json_answer, png_answer, probability_bytes
from server.inference.submission import Segmentation, Work

__all__ = ["JSON", "PNG", "Asked", "encoded"]

PNG = "image/png"
JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    """Of every photo of a request."""

    threshold: float
    original: bool
    """Whether the mask has the photo's size."""
    clean: bool
    mask: MaskFormat
    is_json: bool
    """Else PNG."""
    request_id: str


async def encoded(
    work: Work, segmentation: Segmentation, asked: Asked, held: contextlib.ExitStack
) -> bytes:
    """A photo's answer.

    Args:
        work: that the photo is of.
        segmentation: of the photo.
        asked: see there.
        held: what a large answer counts as is left to it, until the answer is sent.

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
