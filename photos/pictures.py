"""How Pillow's pictures are turned upright, and what is behind the transparent ones.

It loads nothing but Pillow, so that decoders in processes of their own can use it too.
"""

from PIL import Image

__all__ = ["UPRIGHT", "over_white"]

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored picture upright (EXIF 2.32, tag 0x0112)."""


def over_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, over white where it is transparent."""
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")
