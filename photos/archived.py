"""What was found in a DICOM object, as DICOM objects that refer to it, for its archive.

objects = archived(("seg", "sr"), found, data, model=…, quality=0.87, pixel=photo.spacing, …)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from photos import structure
from photos.dicom import process as dicom
from photos.forms import Form, Found, encoded
from photos.image import CorruptImageError, ImageTooLargeError, Room, upsampled
from photos.masks import enclosed
from photos.millimetres import millimetres
from photos.quality import grade

__all__ = ["OBJECTS", "Model", "archived", "names_of"]

OBJECTS = ("seg", "probability", "overlay", "sr")
"""A segmentation, a fractional one of the probabilities, a secondary capture of the photo with the
outline, and a structured report of the measurements (TID 1500)."""

# So many samples of a probability map are up-sampled at a time, so that they stay in cache.
_SAMPLES_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class Model:
    """What found it."""

    name: str
    version: str
    weights_sha256: str
    software: str
    """Version of the software that ran it."""


def names_of(text: str) -> tuple[str, ...]:
    """Objects that a text names, separated by commas, each of them once and in order.

    Raises:
        ValueError: there is no such object, or none is named.
    """
    named = {name.strip() for name in text.split(",")}
    if unknown := named - set(OBJECTS):
        raise ValueError(
            f"there is no object {', '.join(map(repr, sorted(unknown)))}: there are"
            f" {', '.join(OBJECTS)}"
        )
    return tuple(name for name in OBJECTS if name in named)


def archived(
    names: Sequence[str],
    found: Found,
    photo: bytes,
    *,
    model: Model,
    quality: float | None,
    pixel: dicom.Spacing | None,
    max_pixels: int,
    room: Room,
) -> list[bytes]:
    """The objects of these names, which a process of its own writes.

    Args:
        names: of `OBJECTS`.
        found: what was found, at the photo's size.
        photo: the object that it was found in; `read_photo` has read it before.
        model: what found it.
        quality: the Jaccard to be expected of the mask, if it is known.
        pixel: millimetres of a pixel, across and down, if they are known.
        max_pixels, room: as for `photos.image.read_photo`.

    Raises:
        ImageError: nothing can be written that refers to this object.
    """
    with room(found.width * found.height):
        pixels = _pixels(names, found, photo, max_pixels=max_pixels)
        measures, outline = _measures(found, pixel) if "sr" in names else ({}, [])
        said: dict[str, Any] = {
            "objects": list(names),
            "pixels": list(pixels),
            "frame": found.frame,
            "width": found.width,
            "height": found.height,
            "threshold": found.threshold,
            "clean": found.clean,
            "model": asdict(model),
            "quality": None if quality is None else {"jaccard": quality, "grade": grade(quality)},
            "measures": measures,
            "outline": outline,
        }
        said["identity"] = _identity(found, photo, model)
        try:
            return dicom.written(photo, said, list(pixels.values()))
        except structure.TakesTooLongError as error:
            raise CorruptImageError(
                "The results take too long to write as DICOM: ask for fewer objects."
            ) from error
        except MemoryError as error:
            raise ImageTooLargeError(
                "The results take more memory to write as DICOM than there is: ask for fewer"
                " objects."
            ) from error
        except (dicom.RefusedError, ValueError) as error:
            raise CorruptImageError(
                "No result can be written that refers to this DICOM object: its patient's or"
                " study's attributes have values that DICOM does not allow. Ask for another format,"
                " or send the object as its archive has it."
            ) from error


def _identity(found: Found, photo: bytes, model: Model) -> str:
    """What tells these results from all others."""
    digest = hashlib.sha256(photo)
    digest.update(found.network.tobytes())
    digest.update(repr((found.frame, found.threshold, found.clean, model)).encode())
    return digest.hexdigest()


def _pixels(
    names: Sequence[str], found: Found, photo: bytes, *, max_pixels: int
) -> dict[str, bytes]:
    pixels: dict[str, bytes] = {}
    if "seg" in names:
        pixels["seg"] = found.packed.tobytes()
    if "probability" in names:
        lines = max(1, _SAMPLES_AT_ONCE // found.width)
        strips = upsampled(found.probability, found.width, found.height, lines)
        pixels["probability"] = b"".join(
            np.rint(strip * 255).astype(np.uint8).tobytes() for strip in strips
        )
    if "overlay" in names:
        pixels["overlay"] = encoded(Form.OVERLAY_PNG, found, photo, max_pixels=max_pixels)
    return pixels


def _measures(
    found: Found, pixel: dicom.Spacing | None
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Each measure with its unit, and the outline of the largest part; empty without a lesion."""
    if found.features is None:
        return {}, []
    exact = millimetres(found.features, found.lesion.area, found.outlines, pixel or (1.0, 1.0))
    unit = "mm" if pixel else "pixels"
    names = ("area", "perimeter", "diameter", "major_axis", "minor_axis")
    measures = {name: [float(f"{getattr(exact, name):.4g}"), unit] for name in names}
    if pixel:
        measures["area"][1] = "mm2"
    return measures, max((part[0] for part in found.outlines), key=enclosed)
