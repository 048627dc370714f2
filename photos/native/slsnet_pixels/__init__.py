"""The compiled loops over a photo, for `photos.pixels`; `pixels.c` says what each takes."""

import ctypes
import sys
from pathlib import Path

__all__ = ["library"]

_ENDING = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_pointer, _number = ctypes.c_void_p, ctypes.c_int64

library = ctypes.CDLL(str(Path(__file__).parent / f"pixels.{_ENDING}"))
library.pixels_squash.restype = None
library.pixels_squash.argtypes = [
    *(_pointer, _number, _number),
    *(ctypes.c_int32, _pointer, _pointer),
]
library.pixels_mask.restype = None
library.pixels_mask.argtypes = [
    *(_pointer, _number, _number, _number, _number),
    *(ctypes.c_float, _pointer, _pointer),
]
library.pixels_scans.restype = _number
library.pixels_scans.argtypes = [ctypes.c_char_p, _number]
