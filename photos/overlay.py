"""Photos for outlines to be drawn on."""

from PIL import Image

from photos.image import read_photo

__all__ = ["upright"]


def upright(data: bytes, width: int, height: int, most: int) -> Image.Image:
    """The photo in RGB, as it was segmented, in whatever format, mode and orientation it is stored.

    Args:
        data: the photo as stored.
        width, height: size of the upright photo, pixels.
        most: longer side of the picture, pixels; a smaller photo keeps its size.

    Raises:
        ImageError: the photo cannot be read.
    """
    scale = min(1.0, most / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # It takes the way of the network's pixels.
    square = Image.fromarray(read_photo(data, size=max(size)).pixels)
    return square.resize(size, Image.Resampling.BOX)
