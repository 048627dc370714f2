"""What was found in a photo, in the forms of files that people use beside the 1-bit mask.

found = Found(probability, photo.width, photo.height, threshold, clean=False, pixels=…)
content = encoded(Form.SVG, found, data)
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from photos.dicom.process import Spacing
from photos.drawings import overlay, svg
from photos.features import Features, features
from photos.image import DEFAULT_MAX_PIXELS, Room, always_room, encode_grey_png, upsampled
from photos.masks import Figures, Rings, coco_rle, figures, polygons
from photos.millimetres import Millimetres, millimetres
from photos.regions import mask_of

__all__ = [
    "Form",
    "Found",
    "coco_annotation",
    "encoded",
    "forms",
    "in_millimetres",
    "measured",
    "sample_bytes",
]

# Samples of a probability map up-sampled at a time, so that they stay in cache.
_SAMPLES_AT_ONCE = 1 << 17


class Form(StrEnum):
    """Files that can be made of one mask, by the names that clients and commands ask for."""

    OVERLAY = "overlay"
    """JPEG: the photo with the outline, at most 2048 pixels a side."""
    OVERLAY_PNG = "overlay-png"
    """The same as PNG."""
    PROBABILITY8 = "probability8"
    """Greyscale PNG of 8 bits, 255 for a probability of 1."""
    PROBABILITY16 = "probability16"
    """Greyscale PNG of 16 bits, 65535 for 1."""
    NPY = "npy"
    """NumPy's file of the probabilities: float32 [height, width]."""
    SVG = "svg"
    """The outline as paths, at the mask's size."""
    COCO = "coco"
    """An annotation of a COCO data set, as JSON."""
    FEATURES = "features"
    """Measurements of shape and colours, as JSON; null without a lesion."""

    @property
    def suffix(self) -> str:
        """Of a file of this form, after the photo's name."""
        return _SUFFIXES[self]

    @property
    def draws_photo(self) -> bool:
        """Whether the photo is drawn, so that its bytes are needed once more."""
        return self in (Form.OVERLAY, Form.OVERLAY_PNG)


_SUFFIXES = {
    Form.OVERLAY: "_overlay.jpg",
    Form.OVERLAY_PNG: "_overlay.png",
    Form.PROBABILITY8: "_probability8.png",
    Form.PROBABILITY16: "_probability16.png",
    Form.NPY: "_probability.npy",
    Form.SVG: "_outline.svg",
    Form.COCO: "_coco.json",
    Form.FEATURES: "_features.json",
}

_SAMPLE_BYTES = {Form.PROBABILITY8: 1, Form.PROBABILITY16: 2, Form.NPY: 4}


def forms(text: str) -> tuple[Form, ...]:
    """Forms that a text names, separated by commas, each of them once and in order.

    Raises:
        ValueError: there is no such form.
    """
    named = {name.strip() for name in text.split(",")} - {""}
    if unknown := named - set(Form):
        raise ValueError(
            f"there is no form {', '.join(sorted(unknown))}: there are {', '.join(Form)}"
        )
    return tuple(form for form in Form if form in named)


def sample_bytes(form: str) -> int:
    """Bytes of a pixel in a form that holds probabilities; 0 for all others."""
    return next((size for each, size in _SAMPLE_BYTES.items() if each == form), 0)


@dataclass(frozen=True, eq=False)
class Found:
    """A photo's probabilities, and what is drawn from them."""

    network: NDArray[np.float32]
    """float32 [rows, columns]: the network's probabilities, usually [128, 128]."""
    width: int
    """Of the mask, pixels."""
    height: int
    threshold: float
    """Lesion is where the probability is above it."""
    clean: bool
    """Whether only the largest region is left, without its holes."""
    pixels: NDArray[np.uint8]
    """uint8 [rows, columns, 3]: the photo as the network saw it."""
    frame: int | None = None
    """Which frame of the photo's file it is, as it was asked for."""

    @cached_property
    def _shown(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        return mask_of(self.network, self.width, self.height, self.threshold, clean=self.clean)

    @property
    def probability(self) -> NDArray[np.float32]:
        """The probabilities that the mask is drawn from."""
        return self._shown[0]

    @property
    def packed(self) -> NDArray[np.uint8]:
        """The mask in packed bits; see `photos.image.lesion_mask`."""
        return self._shown[1]

    @cached_property
    def lesion(self) -> Figures:
        """The lesion's figures."""
        return figures(self.network, self.probability, self.packed, self.width, self.threshold)

    @cached_property
    def features(self) -> Features | None:
        """The lesion's features; None if there is no lesion."""
        return features(
            *(self.probability, self.width, self.height, self.threshold),
            area=self.lesion.area,
            outlines=self.outlines,
            pixels=self.pixels,
        )

    @cached_property
    def outlines(self) -> list[Rings]:
        """The lesion's outlines, in pixels of the mask."""
        return polygons(self.probability, self.width, self.height, self.threshold, clean=self.clean)


def encoded(
    form: Form,
    found: Found,
    photo: bytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    room: Room = always_room,
) -> bytes:
    """A file of this form.

    Args:
        form: of the file.
        found: what was found, at the photo's size for an overlay.
        photo: the file that it was found in; needed if `form.draws_photo`.
        max_pixels, room: as for `photos.image.read_photo`. Probabilities take room too.
    """
    width, height = found.width, found.height
    match form:
        case Form.OVERLAY | Form.OVERLAY_PNG:
            return overlay(
                *(photo, width, height, found.outlines),
                image_format="PNG" if form is Form.OVERLAY_PNG else "JPEG",
                max_pixels=max_pixels,
                room=room,
                frame=found.frame,
            )
        case Form.PROBABILITY8 | Form.PROBABILITY16 | Form.NPY:
            with room(width * height):
                if form is Form.NPY:
                    return _npy(found.probability, width, height)
                eight = form is Form.PROBABILITY8
                return encode_grey_png(found.probability, width, height, 8 if eight else 16)
        case Form.SVG:
            return svg(width, height, found.outlines).encode("ascii")
        case Form.COCO:
            return _json(coco_annotation(found))
        case Form.FEATURES:
            features_ = measured(found)
            return _json(features_ and asdict(features_))


def measured(found: Found) -> Features | None:
    """The lesion's features, rounded to what they are worth; None if there is no lesion."""
    exact = found.features
    return exact and Features(**{name: _rounded(value) for name, value in asdict(exact).items()})


def in_millimetres(found: Found, pixel: Spacing) -> Millimetres | None:
    """The lesion's measures on the skin, rounded as `measured` does; None if there is no lesion.

    Args:
        found: what was found, at the photo's size.
        pixel: millimetres of a pixel, across and down.
    """
    if found.features is None:
        return None
    exact = millimetres(found.features, found.lesion.area, found.outlines, pixel)
    return Millimetres(**{name: _rounded(value) for name, value in asdict(exact).items()})


def coco_annotation(found: Found) -> dict[str, Any]:
    """The mask as an annotation of a COCO data set, whose ids are the caller's to change.

    Its segmentation is run lengths, which have holes and lose no pixel; COCO's polygons have none.
    """
    lesion = found.lesion
    return {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "segmentation": coco_rle(found.packed, found.width),
        "area": lesion.area,
        "bbox": list(lesion.bounding_box or (0, 0, 0, 0)),
        "iscrowd": 0,
    }


def _npy(probability: NDArray[np.float32], width: int, height: int) -> bytes:
    out = BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (height, width)}
    np.lib.format.write_array_header_1_0(out, header)
    for strip in upsampled(probability, width, height, max(1, _SAMPLES_AT_ONCE // width)):
        out.write(strip.astype("<f4", copy=False).data)
    return out.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return float(f"{value:.4g}")
