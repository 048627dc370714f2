"""The compiled loops over a photo: the same bits as Pillow's and numpy's, in less time.

They are the package `slsnet_pixels` (photos/native), which pip builds on installation. Where it
is missing or does not load, all functions return None, and the log says so once.
"""

import ctypes
import logging
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

try:
    import slsnet_pixels

    library = slsnet_pixels.library
except (ImportError, OSError, AttributeError):  # missing, or for another system or version
    library = None

__all__ = ["library", "mask", "scans", "squash"]

log = logging.getLogger("slsnet.pixels")

# Bytes of one pixel of an RGB picture in Pillow's memory.
_PIXEL_BYTES = 4

_said = threading.Lock()


def _is_here() -> bool:
    # The log is not configured while this is imported, so the first photo says it.
    if library is None and _said.acquire(blocking=False):
        log.warning(
            "the compiled loops are not installed: the same masks, slower;"
            " pip install ./photos/native builds them"
        )
    return library is not None


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype = ctypes.c_void_p
_pointer_in.argtypes = [ctypes.py_object, ctypes.c_char_p]


def squash(image: Image.Image, size: int) -> NDArray[np.uint8] | None:
    """Shrink as `image.resize((size, size), Image.Resampling.BOX)` does; uint8 [size, size, 3].

    Args:
        image: an RGB picture.
        size: side of the square, pixels.

    Returns:
        None where Pillow has to do it. That is so for a large picture, which Pillow holds in
        several pieces; for a tall one, whose columns Pillow averages first, with other rounding;
        and where PILLOW_ALIGNMENT leaves room between lines.
    """
    if (
        not _is_here()
        or _imaging.get_alignment() > _PIXEL_BYTES
        or 2 * image.width <= image.height + size
    ):
        return None
    try:
        # This is Pillow's own memory, not a copy. The capsule keeps it alive.
        _, array = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        return None
    scratch = np.empty(6 * size, np.int32)
    square = np.empty((size, size, 3), np.uint8)
    library.pixels_squash(
        _pointer_in(array, b"arrow_array"),
        *(image.width, image.height, size),
        *(scratch.ctypes.data, square.ctypes.data),
    )
    return square


def mask(
    probability: NDArray[np.float32], width: int, height: int, threshold: float
) -> NDArray[np.uint8] | None:
    """Do what `photos.image.lesion_mask` does, except padding bits; None where numpy has to."""
    if not _is_here():
        return None
    probability = np.ascontiguousarray(probability, np.float32)
    stride = -(-width // 8)
    scratch = np.empty(34 * stride, np.float32)
    packed = np.empty((height, stride), np.uint8)
    library.pixels_mask(
        *(probability.ctypes.data, *probability.shape),
        *(width, height, threshold, scratch.ctypes.data, packed.ctypes.data),
    )
    return packed


def scans(jpeg: bytes) -> int | None:
    """Count the scans of the picture; None where numpy has to count them."""
    if not _is_here():
        return None
    count: int = library.pixels_scans(jpeg, len(jpeg))
    return count
