"""A photo, and the part of it that an annotator points at."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from slsnet_client.client import AsyncClient
from slsnet_client.photos import photo_bytes
from slsnet_client.result import result_of

__all__ = ["Box", "Crop", "Drawn", "around", "drawn"]

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels of the upright photo."""

# As the server reads; Pillow's other decoders never run.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")

# The network was trained on lesions with some skin around them.
_MARGIN = 0.25

# A point says where, and not how large: a square of this share of the photo's longer side.
_POINT_SHARE = 0.5

_SMALLEST = 32

# As the server's own default.
_MAX_PIXELS = 64_000_000


Crop = Callable[[int, int], Box | None]
"""Gets width and height of the upright photo; returns the part to look at, None for all of it."""

Parts = list[list[list[tuple[float, float]]]]
"""Outlines in pixels: for each separate part its rings of (x, y), the outer one first."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A lesion that was found."""

    width: int
    """Of the upright photo, pixels."""
    height: int
    mask: NDArray[np.bool_] | None
    """[height, width]; None if outlines were asked for."""
    outlines: Parts
    """In pixels of the photo; empty if the mask was asked for."""
    score: float
    """Mean probability inside, 0 to 1; 0 if nothing was found."""
    version: str
    """Of the network that answered."""


def around(
    boxes: Sequence[tuple[float, float, float, float]],
    points: Sequence[tuple[float, float]],
    width: int,
    height: int,
) -> Box | None:
    """The part of a photo that boxes or, without any, points are about; None without either.

    Args:
        boxes: x, y, width and height, in pixels.
        points: x and y, in pixels.
        width, height: the photo's, pixels.
    """
    if boxes:
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
        across, down = _MARGIN * (right - left), _MARGIN * (bottom - top)
    elif points:
        left, top = (min(point[axis] for point in points) for axis in (0, 1))
        right, bottom = (max(point[axis] for point in points) for axis in (0, 1))
        across = down = _POINT_SHARE * max(width, height) / 2
    else:
        return None
    edges = (left - across, top - down, right + across, bottom + down)
    x0, y0 = max(0, int(edges[0])), max(0, int(edges[1]))
    x1, y1 = min(width, int(edges[2]) + 1), min(height, int(edges[3]) + 1)
    # So that there is something to see.
    x0, y0 = min(x0, max(0, width - _SMALLEST)), min(y0, max(0, height - _SMALLEST))
    return x0, y0, max(x1, min(width, x0 + _SMALLEST)), max(y1, min(height, y0 + _SMALLEST))


async def drawn(
    client: AsyncClient,
    photo: bytes,
    crop: Crop | None = None,
    *,
    outlines: bool,
    threshold: float = 0.5,
    clean: bool = False,
) -> Drawn:
    """Segment a photo, or a part of it, in which there is one lesion.

    Args:
        client: asks the server.
        photo: the file.
        crop: chooses the part; None for all of it.
        outlines: whether to return outlines instead of the mask.
        threshold, clean: as for `AsyncClient.segment`.

    Raises:
        SlsnetError: the server refused or failed.
        ValueError: the photo cannot be cropped.
    """
    part, sent = None, photo
    if crop is not None and (cropped := await asyncio.to_thread(_cropped, photo, crop)):
        width, height, part, sent = cropped
    clean = clean or part is not None
    asked = "polygons" if outlines else "png"
    answer = await client.segment_json(sent, asked, threshold=threshold, clean=clean)
    if part is None:
        width, height = answer["image"]["width"], answer["image"]["height"]
        part = (0, 0, width, height)
    mask, parts = None, []
    if outlines:
        parts = [
            [[(x + part[0], y + part[1]) for x, y in ring] for ring in rings]
            for rings in answer["mask"]["polygons"]
        ]
    else:
        mask = np.zeros((height, width), np.bool_)
        mask[part[1] : part[3], part[0] : part[2]] = result_of(answer).mask
    score = answer["lesion"]["mean_probability"] or 0.0
    return Drawn(width, height, mask, parts, score, answer["model"]["version"])


def _cropped(photo: bytes, crop: Crop) -> tuple[int, int, Box, bytes] | None:
    try:
        with Image.open(BytesIO(photo), formats=_FORMATS) as stored:
            if stored.width * stored.height > _MAX_PIXELS:
                raise ValueError(f"The photo has more than {_MAX_PIXELS} pixels.")
            upright = ImageOps.exif_transpose(stored)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"The photo does not decode, so no part of it is taken: {error}"
        ) from error
    part = crop(upright.width, upright.height)
    if part is None:
        return None
    # PNG loses none of the pixels.
    return upright.width, upright.height, part, photo_bytes(upright.crop(part).convert("RGB"))
