"""The loops over a photo that are compiled: the same bits as Pillow's and numpy's, sooner.

`pixels.c` is in the tree as a library too, as users have no compiler, and is made by
`model.build_pixels`. Where it does not load (another processor, another system) all
functions give None.
"""

import ctypes
import platform
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, _imaging

__all__ = ["LIBRARY", "mask", "scans", "squash"]

LIBRARY = Path(__file__).parent / "pixels-x86_64.so"

# Of an RGB picture in Pillow's memory.
_PIXEL_BYTES = 4


def _load() -> ctypes.CDLL | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.pixels_squash.restype = None
        library.pixels_squash.argtypes = [pointer, number, number, ctypes.c_int32, pointer, pointer]
        library.pixels_mask.restype = None
        library.pixels_mask.argtypes = [
            *(pointer, number, number, number, number),
            *(ctypes.c_float, pointer, pointer),
        ]
        library.pixels_scans.restype = number
        library.pixels_scans.argtypes = [ctypes.c_char_p, number]
    except (OSError, AttributeError):
        # Of an older source, too: what builds it anew imports this.
        return None
    return library


_library = _load()

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
        _library is None
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
    if _library is None:
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
    if _library is None:
        return None
    count: int = _library.pixels_scans(jpeg, len(jpeg))
    return count
