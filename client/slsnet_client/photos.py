"""Photos as callers have them: the bytes that are sent, and outlines drawn over them."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

__all__ = ["Photo", "overlay", "photo_bytes"]

Photo = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image
"""A path, a file's bytes, pixels (uint8 [h, w], [h, w, 3] RGB or [h, w, 4]), or Pillow's image."""

_PNG_MODES = frozenset({"1", "L", "LA", "P", "I;16", "RGB", "RGBA"})

# Bluish green on black: told apart from skin by people who see red and green alike.
_LINE, _EDGE = (0, 235, 200), (0, 0, 0)


def photo_bytes(photo: Photo) -> bytes:
    """What is sent: a file as it is, pixels as PNG, which loses none of them.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: it is no photo.
    """
    if isinstance(photo, bytes):
        return photo
    if isinstance(photo, str | os.PathLike):
        return Path(photo).read_bytes()
    picture = _upright(photo)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    out = BytesIO()
    # Hardly larger than at the best level for photos, and many times as fast.
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def overlay(
    photo: Photo, mask: NDArray[np.bool_], colour: tuple[int, int, int] = _LINE
) -> Image.Image:
    """The photo with the mask's outline drawn over it, in RGB.

    Args:
        photo: as for `segment`; what Pillow cannot open has to come as pixels.
        mask: [height, width] of the photo, upright, as in `Result.mask`.
        colour: of the line, RGB; it has a black edge.

    Raises:
        ValueError: mask and photo differ in size.
        OSError, TypeError: the photo cannot be read.
    """
    picture = _upright(photo).convert("RGB")
    if mask.shape != (picture.height, picture.width):
        raise ValueError(
            f"The mask has {mask.shape} pixels, the photo {(picture.height, picture.width)}."
        )
    # A pixel of the outline is lesion and has a neighbour that is not; beyond the frame nothing is.
    framed = np.pad(mask, 1)
    inside = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    outline = Image.fromarray((mask & ~inside).astype(np.uint8) * 255)
    # Beyond 8 a blurred pixel could vanish in rounding.
    reach = min(8, max(1, round(max(picture.size) / 600)))
    for line_colour, distance in ((_EDGE, reach + 1), (colour, reach)):
        near = np.asarray(outline.filter(ImageFilter.BoxBlur(distance))) > 0
        picture.paste(line_colour, mask=Image.fromarray(near.astype(np.uint8) * 255))
    return picture


def _upright(photo: Any) -> Image.Image:
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or not (
            photo.ndim == 2 or (photo.ndim == 3 and photo.shape[2] in (3, 4))
        ):
            raise TypeError(
                "Pixels are uint8 [h, w], [h, w, 3] or [h, w, 4],"
                f" not {photo.dtype} {list(photo.shape)}."
            )
        return Image.fromarray(np.ascontiguousarray(photo))
    if isinstance(photo, bytes):
        photo = Image.open(BytesIO(photo))
    elif isinstance(photo, str | os.PathLike):
        photo = Image.open(BytesIO(Path(photo).read_bytes()))
    elif not isinstance(photo, Image.Image):
        raise TypeError(
            f"A photo is a path, bytes, an array or Pillow's image, not {type(photo).__name__}."
        )
    return ImageOps.exif_transpose(photo)
