"""The names by which clients of `/v2` knew `photos.image` before it had a package of its own."""

from photos.image import lesion_mask, read_photo

__all__ = ["lesion_mask", "read_photo"]
