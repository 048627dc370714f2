"""A photo's answer in the form that was asked for."""

import contextlib
from dataclasses import dataclass

from photos.quality import grade
from server.http.answers import MaskFormat, json_answer, png_answer, probability_bytes
from server.inference.submission import Segmentation, Work

__all__ = ["JSON", "PNG", "QUALITY", "Asked", "Encoded", "encoded"]

PNG = "image/png"
JSON = "application/json"

QUALITY = "Mask-Quality"
"""Header of a mask as PNG: its quality, a number and a parameter as in RFC 9651."""


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
    borders: bool = False
    """Whether JSON has a tight and a generous outline too."""


@dataclass(frozen=True)
class Encoded:
    """A photo's answer."""

    content: bytes
    quality: float | None
    """The Jaccard to be expected of its mask; None if that is not known."""

    @property
    def headers(self) -> dict[str, str]:
        """What a PNG cannot hold."""
        if self.quality is None:
            return {}
        return {QUALITY: f"{self.quality:.3f};grade={grade(self.quality)}"}


async def encoded(
    work: Work, segmentation: Segmentation, asked: Asked, held: contextlib.ExitStack
) -> Encoded:
    """A photo's answer.

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
        found = await work.encode(
            lambda: png_answer(segmentation, threshold, original, clean=clean),
            here=segmentation.is_small and not clean and not work.bulk,
        )
        return _counted(work, *found)
    size = probability_bytes(segmentation, original, asked.mask)
    held.enter_context(work.service.gate.answer_bytes(size, bulk=work.bulk))
    found = await work.encode(
        lambda: json_answer(
            segmentation,
            threshold,
            original,
            asked.mask,
            clean=clean,
            borders=asked.borders,
            request_id=asked.request_id,
            timings_ms=work.stages.milliseconds(),
            room=work.service.pixels.room,
        )
    )
    return _counted(work, *found)


def _counted(work: Work, content: bytes, quality: float | None) -> Encoded:
    if quality is not None:
        work.service.metrics.mask_quality.observe(quality)
    return Encoded(content, quality)
