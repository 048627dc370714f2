"""A lesion's outline, drawn: over its photo, and as SVG."""

from collections.abc import Sequence
from io import BytesIO
from typing import Literal

from PIL import ImageDraw

from photos.image import DEFAULT_MAX_PIXELS, Room, always_room
from photos.masks import Rings
from photos.overlay import upright

__all__ = ["LARGEST_OVERLAY", "overlay", "svg"]

LARGEST_OVERLAY = 2048
"""The longer side of an overlay, pixels; larger photos are reduced."""

# Bluish green on black: people who cannot tell red from green can tell it from skin.
_LINE, _EDGE = (0, 235, 200), (0, 0, 0)


def overlay(
    data: bytes,
    width: int,
    height: int,
    outlines: Sequence[Rings],
    *,
    image_format: Literal["JPEG", "PNG"] = "JPEG",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    room: Room = always_room,
    frame: int | None = None,
) -> bytes:
    """The photo with its lesion's outline.

    Args:
        data: the photo as stored; `read_photo` has read it before.
        width, height: size of the upright photo, pixels.
        outlines: result of `photos.masks.polygons`, in the photo's pixels.
        image_format: of the result.
        max_pixels, room, frame: as for `read_photo`.

    Returns:
        The picture at the photo's size; a larger photo is reduced to `LARGEST_OVERLAY`.
    """
    picture = upright(
        *(data, width, height, LARGEST_OVERLAY), max_pixels=max_pixels, room=room, frame=frame
    )
    scale = picture.width / width
    draw = ImageDraw.Draw(picture)
    thick = max(2, round(max(picture.size) / 300))
    for colour, line in ((_EDGE, thick + 2), (_LINE, thick)):
        for rings in outlines:
            for ring in rings:
                points = [(x * scale, y * scale) for x, y in [*ring, ring[0], ring[1]]]
                draw.line(points, colour, line, joint="curve")
    out = BytesIO()
    if image_format == "JPEG":
        picture.save(out, "JPEG", quality=90)
    else:
        # Hardly larger than at the best level for photos, and many times as fast.
        picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def svg(width: int, height: int, outlines: Sequence[Rings]) -> str:
    """The outline as an SVG document at the photo's size, in ASCII.

    It has one path for each separate part, whose holes are left empty (`evenodd`). A style sheet
    finds them by the class `lesion`.
    """
    paths = "".join(f'<path d="{"".join(map(_closed, rings))}"/>' for rings in outlines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        f' viewBox="0 0 {width} {height}"><g class="lesion" fill="#00ebc8" fill-opacity="0.25"'
        ' fill-rule="evenodd" stroke="#00ebc8" stroke-width="2" stroke-linejoin="round">'
        f"{paths}</g></svg>\n"
    )


def _closed(ring: list[tuple[float, float]]) -> str:
    points = "L".join(f"{x} {y}" for x, y in ring)
    return f"M{points}Z"
