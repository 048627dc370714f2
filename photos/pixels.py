"""The loops over a photo that are compiled: the same bits as Pillow's and numpy's, sooner.

They are the package `slsnet_pixels` (photos/native), which is built as it is installed. Where it is
not installed or does not load all functions give None, and the log says so once.
"""

import ctypes
import logging
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

try:
    import slsnet_pixels

    _library = slsnet_pixels.library
except (ImportError, OSError, AttributeError):  # not there; of another system; of another version
    _library = None

__all__ = ["mask", "scans", "squash"]

log = logging.getLogger("slsnet.pixels")

# Of an RGB picture in Pillow's memory.
_PIXEL_BYTES = 4

_said = threading.Lock()


def _is_here() -> bool:
    # Told at the first photo, not as this is imported: the log is not configured by then.
    if _library is None and _said.acquire(blocking=False):
        log.warning(
            "the compiled loops are not installed: the same masks, slower;"
            " pip install ./photos/native builds them"
        )
    return _library is not None


_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype = ctypes.c_void_p
_pointer_in.argtypes = [ctypes.py_object, ctypes.c_char_p]


def squash(image: Image.Image, size: int) -> NDArray[np.uint8] | None:
    """
    What `image.resize((size, size), Image.Resampling.BOX)` gives, uint8 [size, size, 3].

    Args:
        image: RGB.
        size: side of the square, pixels.

    Returns:
        None where Pillow has to do it: also for a large picture, which it holds in several pieces,
        a tall one, of which it averages columns first and rounds otherwise, and where
        PILLOW_ALIGNMENT has it leave room between lines.
    """
    if (
        not _is_here()
        or _imaging.get_alignment() > _PIXEL_BYTES
        or 2 * image.width <= image.height + size
    ):
        return None
    try:
        # Its own memory, not a copy: held as long as the capsule is.
        _, array = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        return None
    scratch = np.empty(6 * size, np.int32)
    square = np.empty((size, size, 3), np.uint8)
    _library.pixels_squash(
        _pointer_in(array, b"arrow_array"),
        *(image.width, image.height, size),
        *(scratch.ctypes.data, square.ctypes.data),
    )
    return square


def mask(
    probability: NDArray[np.float32], width: int, height: int, threshold: float
) -> NDArray[np.uint8] | None:
    """What `photos.image.lesion_mask` gives, but for the padding bits; None where numpy has to."""
    if not _is_here():
        return None
    probability = np.ascontiguousarray(probability, np.float32)
    stride = -(-width // 8)
    scratch = np.empty(34 * stride, np.float32)
    packed = np.empty((height, stride), np.uint8)
    _library.pixels_mask(
        *(probability.ctypes.data, *probability.shape),
        *(width, height, threshold, scratch.ctypes.data, packed.ctypes.data),
    )
    return packed


def scans(jpeg: bytes) -> int | None:
    """How many scans the picture has; None where numpy has to count them."""
    if not _is_here():
        return None
    count: int = _library.pixels_scans(jpeg, len(jpeg))
    return count
