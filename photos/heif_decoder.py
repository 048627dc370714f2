"""Decodes one photo, AVIF or HEIC, from standard input; `photos.heif` runs it.

Its arguments are the format's name, the side of the result in pixels, the orientation, and how many
bytes of memory and seconds of CPU it may take. It reads the file, with its length before it (8
bytes, little-endian). It writes width and height of the upright picture (32 bits each,
little-endian), then the pixels in RGB, by area average. Exit code: 0, 3 if memory did not suffice,
or anything else if it does not decode.
"""

import struct
import sys
from io import BytesIO

from PIL import AvifImagePlugin, Image, ImageFile

from photos.pictures import UPRIGHT, over_white
from photos.processes.child import NO_MEMORY, limit, taken

# The decoders are asked directly, since `Image.open` would load others first. Each has one thread,
# since the server decodes several photos at a time.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
_DECODERS: dict[str, type[ImageFile.ImageFile]] = {"AVIF": AvifImagePlugin.AvifImageFile}
try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = False
    _DECODERS["HEIC"] = pillow_heif.HeifImageFile


def main() -> int:
    """Decode; return the exit code."""
    name = sys.argv[1]
    size, orientation, memory, cpu_s = map(int, sys.argv[2:])
    data = taken()
    opens = _DECODERS[name]
    limit(memory, cpu_s)
    try:
        with opens(BytesIO(data)) as image:
            image.load()
            upright: Image.Image = image
            if name == "AVIF" and orientation in UPRIGHT:
                # libheif turns the picture itself.
                upright = image.transpose(UPRIGHT[orientation])
            square = over_white(upright).resize((size, size), Image.Resampling.BOX)
            sys.stdout.buffer.write(struct.pack("<II", *upright.size) + square.tobytes())
            sys.stdout.buffer.flush()
    except MemoryError:
        return NO_MEMORY
    return 0
