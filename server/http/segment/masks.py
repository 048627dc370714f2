"""A photo's answer in the form that was asked for."""

import contextlib
from dataclasses import dataclass

from photos.dicom.process import is_dicom
from photos.fitness import is_unfit
from photos.forms import Form
from photos.quality import grade
from server.http.answers import (
    MaskFormat,
    answer_bytes,
    dicom_answer,
    form_answer,
    json_answer,
    png_answer,
)
from server.http.uploads import DICOM
from server.inference.errors import Unprocessable
from server.inference.submission import Body, Segmentation, Work

__all__ = [
    "DICOM_FORM",
    "FITNESS",
    "JSON",
    "MEDIA_TYPES",
    "PNG",
    "QUALITY",
    "Asked",
    "Encoded",
    "encoded",
]

PNG = "image/png"
JSON = "application/json"

QUALITY = "Mask-Quality"
"""Header of a mask as PNG: its quality, a number and a parameter as in RFC 9651."""

FITNESS = "Photo-Fitness"
"""Header beside it: whether it is a dermoscopic photo, a token with its distance as a parameter."""

DICOM_FORM = "dicom"
"""An answer of DICOM objects that refer to the photo's."""

MEDIA_TYPES: dict[str, str] = {
    Form.OVERLAY: "image/jpeg",
    Form.OVERLAY_PNG: PNG,
    Form.PROBABILITY8: PNG,
    Form.PROBABILITY16: PNG,
    Form.NPY: "application/x-npy",
    Form.SVG: "image/svg+xml",
    Form.COCO: JSON,
    DICOM_FORM: DICOM,
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
    reject_unfit: bool = False
    """Whether a picture that is likely no dermoscopic photo is an error."""
    network: str | None = None
    """Name of the network that runs; None for the default one."""
    objects: tuple[str, ...] = ()
    """Which objects a DICOM answer has: see `photos.archived.OBJECTS`."""
    boundary: str = ""
    """Between several objects."""

    @property
    def file_type(self) -> str:
        """Media type of a photo's answer that is a file."""
        if self.boundary:
            return f'multipart/related; type="{DICOM}"; boundary={self.boundary}'
        return MEDIA_TYPES.get(self.form, PNG)

    @property
    def needs_photo(self) -> bool:
        """Whether the photo's bytes are needed until the answer is made."""
        held = self.mask if self.form == "json" else self.form
        return held in (Form.OVERLAY, Form.OVERLAY_PNG, DICOM_FORM)

    def check(self, photo: bytes) -> None:
        """Check that such an answer can be made of the photo.

        Raises:
            Unprocessable: it is to be DICOM, which refers to its source, and the photo is not.
        """
        # That there is none at all is told later.
        if self.form == DICOM_FORM and photo and not is_dicom(photo):
            raise Unprocessable(
                "format=dicom is for a photo that is DICOM itself, since the answer refers to its"
                " patient and study: send a DICOM object, or ask for another format."
            )


@dataclass(frozen=True)
class Encoded:
    """A photo's answer."""

    content: bytes
    quality: float | None
    """The Jaccard to be expected of its mask; None if that is not known."""
    distance: float | None
    """From dermoscopic photos, 1 is the limit; None if that is not known."""

    @property
    def headers(self) -> dict[str, str]:
        """What a PNG cannot hold."""
        headers = {}
        if self.quality is not None:
            headers[QUALITY] = f"{self.quality:.3f};grade={grade(self.quality)}"
        if self.distance is not None:
            word = "unfit" if is_unfit(self.distance) else "fit"
            headers[FITNESS] = f"{word};distance={self.distance:.3f}"
        return headers


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
        photo: its bytes, if `asked.needs_photo`; let go once the answer is made.
        held: gets the budget's bytes of a large answer, to give them back once it is sent.

    Raises:
        Overloaded: there is no room for a large answer.
        Unprocessable: it is no dermoscopic photo, or nobody knows, and `asked` refuses such ones.
    """
    if asked.form == "png":
        here = segmentation.is_small and not asked.clean and not work.bulk
        return _counted(
            work, await work.encode(lambda: _made(work, segmentation, asked), here=here)
        )
    as_json = asked.form == "json"
    form = asked.mask if as_json else asked.form
    size = answer_bytes(segmentation, asked.original, form, as_json=as_json, objects=asked.objects)
    held.enter_context(work.service.gate.answer_bytes(size, bulk=work.bulk))
    pixels = segmentation.width * segmentation.height
    slow = asked.needs_photo and work.is_slow(photo.data, pixels)
    answer = await work.encode(lambda: _made(work, segmentation, asked, photo.take()), slow=slow)
    return _counted(work, answer)


def _made(work: Work, segmentation: Segmentation, asked: Asked, photo: bytes = b"") -> Encoded:
    """Run in a thread, or here: the answer, from the photo's bytes if it draws it."""
    distance = _distance(work, segmentation, refuse=asked.reject_unfit)
    drawn, clean = (segmentation, asked.threshold, asked.original), asked.clean
    max_pixels, room = work.service.settings.max_pixels, work.service.pixels.room
    if asked.form == "png":
        made = png_answer(*drawn, clean=clean)
    elif asked.form == DICOM_FORM:
        objects, quality = dicom_answer(
            *(segmentation, asked.threshold, asked.objects),
            clean=clean,
            photo=photo,
            room=room,
            max_pixels=max_pixels,
        )
        made = _joined(objects, asked.boundary), quality
    elif asked.form == "json":
        made = json_answer(
            *(*drawn, asked.mask),
            clean=clean,
            borders=asked.borders,
            features=asked.features,
            distance=distance,
            photo=photo,
            request_id=asked.request_id,
            timings_ms=work.stages.milliseconds(),
            room=room,
            max_pixels=max_pixels,
        )
    else:
        made = form_answer(
            *(*drawn, Form(asked.form)),
            clean=clean,
            photo=photo,
            room=room,
            max_pixels=max_pixels,
        )
    return Encoded(*made, distance)


def _distance(work: Work, segmentation: Segmentation, *, refuse: bool) -> float | None:
    """The photo's distance from dermoscopic ones, if that is known.

    Raises:
        Unprocessable: it is unfit, or nobody knows, and such photos are to be refused.
    """
    detector = segmentation.backend.detector
    if detector is None:
        if refuse:
            raise Unprocessable(
                "reject_unfit=true: the network that is served has no detector of pictures that are"
                " no dermoscopic photos. Leave reject_unfit out, and look at the photos."
            )
        return None
    distance = detector.distance(segmentation.pixels)
    if is_unfit(distance):
        work.service.metrics.unfit_photos.inc()
        if refuse:
            raise Unprocessable(
                f"This is likely no dermoscopic photo (distance {distance:.2f}, the limit is 1):"
                " send a photo of one lesion, taken through a dermatoscope, or leave reject_unfit"
                " out."
            )
    return distance


def _joined(objects: list[bytes], boundary: str) -> bytes:
    """One object as it is; several as the parts that DICOMweb stores (PS3.18, 8.6.1.2)."""
    if len(objects) == 1:
        return objects[0]
    head = f"--{boundary}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
    parts = b"".join(head + content + b"\r\n" for content in objects)
    return parts + f"--{boundary}--\r\n".encode()


def _counted(work: Work, answer: Encoded) -> Encoded:
    if answer.quality is not None:
        work.service.metrics.mask_quality.observe(answer.quality)
    return answer
