"""A photo's answer in the form that was asked for."""

import contextlib
from dataclasses import dataclass

from photos.forms import Form
from photos.quality import grade
from server.http.answers import MaskFormat, answer_bytes, form_answer, json_answer, png_answer
from server.inference.submission import Body, Segmentation, Work

__all__ = ["JSON", "MEDIA_TYPES", "PNG", "QUALITY", "Asked", "Encoded", "encoded"]

PNG = "image/png"
JSON = "application/json"

QUALITY = "Mask-Quality"
"""Header of a mask as PNG: its quality, a number and a parameter as in RFC 9651."""

MEDIA_TYPES: dict[str, str] = {
    Form.OVERLAY: "image/jpeg",
    Form.OVERLAY_PNG: PNG,
    Form.PROBABILITY8: PNG,
    Form.PROBABILITY16: PNG,
    Form.NPY: "application/x-npy",
    Form.SVG: "image/svg+xml",
    Form.COCO: JSON,
}
"""Forms that an answer may be as a whole, beside the mask as PNG and JSON."""


@dataclass(frozen=True)
class Asked:
    """The form of answer for every photo of a request."""

    threshold: float
    original: bool
    """Whether the mask has the photo's size."""
    clean: bool
    mask: MaskFormat
    """How a JSON answer holds the mask."""
    features: bool
    """Whether a JSON answer has the lesion's features."""
    form: str
    """`json`, `png`, or one of `MEDIA_TYPES`."""
    media_type: str
    """Of the whole answer."""
    request_id: str
    borders: bool = False
    """Whether JSON has a tight and a generous outline too."""
    frame: int | None = None
    """Which frame of the photo's file is meant."""

    @property
    def draws_photo(self) -> bool:
        """Whether the photo is drawn, so that its bytes are needed until the answer is made."""
        held = self.mask if self.form == "json" else self.form
        return held in (Form.OVERLAY, Form.OVERLAY_PNG)


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
    work: Work,
    segmentation: Segmentation,
    asked: Asked,
    photo: Body,
    held: contextlib.ExitStack,
) -> Encoded:
    """A photo's answer.

    Args:
        work: the work that the photo belongs to.
        segmentation: the photo's.
        asked: the form of the answer.
        photo: its bytes, if `asked.draws_photo`; let go once the answer is made.
        held: gets the budget's bytes of a large answer, to give them back once it is sent.

    Raises:
        Overloaded: there is no room for a large answer.
    """
    threshold, original, clean = asked.threshold, asked.original, asked.clean
    if asked.form == "png":
        found = await work.encode(
            lambda: png_answer(segmentation, threshold, original, clean=clean),
            here=segmentation.is_small and not clean and not work.bulk,
        )
        return _counted(work, *found)
    as_json = asked.form == "json"
    size = answer_bytes(
        segmentation, original, asked.mask if as_json else asked.form, as_json=as_json
    )
    held.enter_context(work.service.gate.answer_bytes(size, bulk=work.bulk))
    max_pixels, room = work.service.settings.max_pixels, work.service.pixels.room
    pixels = segmentation.width * segmentation.height

    def make() -> tuple[bytes, float | None]:
        data = photo.take()
        if not as_json:
            return form_answer(
                *(segmentation, threshold, original, Form(asked.form)),
                clean=clean,
                photo=data,
                room=room,
                max_pixels=max_pixels,
            )
        return json_answer(
            *(segmentation, threshold, original, asked.mask),
            clean=clean,
            borders=asked.borders,
            features=asked.features,
            photo=data,
            request_id=asked.request_id,
            timings_ms=work.stages.milliseconds(),
            room=room,
            max_pixels=max_pixels,
        )

    slow = asked.draws_photo and work.is_slow(photo.data, pixels)
    return _counted(work, *await work.encode(make, slow=slow))


def _counted(work: Work, content: bytes, quality: float | None) -> Encoded:
    if quality is not None:
        work.service.metrics.mask_quality.observe(quality)
    return Encoded(content, quality)
