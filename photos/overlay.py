"""Photos for outlines to be drawn on."""

from PIL import Image

from photos.image import DEFAULT_MAX_PIXELS, Room, always_room, read_photo

__all__ = ["upright"]


def upright(
    data: bytes,
    width: int,
    height: int,
    most: int,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    room: Room = always_room,
    frame: int | None = None,
) -> Image.Image:
    """The photo in RGB, as it was segmented, in whatever format, mode and orientation it is stored.

    Args:
        data: the photo as stored.
        width, height: size of the upright photo, pixels.
        most: longer side of the picture, pixels; a smaller photo keeps its size.
        max_pixels, room, frame: as for `read_photo`.

    Raises:
        ImageError: the photo cannot be read.
    """
    scale = min(1.0, most / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # It takes the way of the network's pixels.
    read = read_photo(data, size=max(size), max_pixels=max_pixels, room=room, frame=frame)
    return Image.fromarray(read.pixels).resize(size, Image.Resampling.BOX)
