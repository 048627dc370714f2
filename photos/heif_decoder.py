"""Decodes one photo, AVIF or HEIC, from standard input; `photos.heif` runs it.

    python -I heif_decoder.py NAME SIZE ORIENTATION MEMORY_BYTES CPU_SECONDS

Writes width and height of the upright picture (32 bits each, little-endian), then SIZE×SIZE pixels
in RGB, by area average. Exit code: 0, 3 if memory did not suffice, or anything else if it does not
decode. It imports little, since each photo starts it anew.
"""

import contextlib
import struct
import sys
from io import BytesIO

from PIL import Image, ImageFile

# As in `photos.image`.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_NO_MEMORY = 3


def main() -> int:
    """Decode; return the exit code."""
    name = sys.argv[1]
    size, orientation, memory, cpu_s = map(int, sys.argv[2:])
    data = sys.stdin.buffer.read()
    opens = _opener(name)
    limit(memory, cpu_s)
    try:
        with opens(BytesIO(data)) as image:
            image.load()
            upright: Image.Image = image
            if name == "AVIF" and orientation in _UPRIGHT:
                # libheif turns the picture itself.
                upright = image.transpose(_UPRIGHT[orientation])
            square = _over_white(upright).resize((size, size), Image.Resampling.BOX)
            sys.stdout.buffer.write(struct.pack("<II", *upright.size) + square.tobytes())
            sys.stdout.buffer.flush()
    except MemoryError:
        return _NO_MEMORY
    return 0


def _opener(name: str) -> type[ImageFile.ImageFile]:
    """Load the decoder. It is asked directly, since `Image.open` would load others first."""
    if name == "AVIF":
        from PIL import AvifImagePlugin

        # The server decodes several photos at a time.
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        return AvifImagePlugin.AvifImageFile
    import pillow_heif

    pillow_heif.options.DECODE_THREADS = 1
    pillow_heif.options.THUMBNAILS = False
    return pillow_heif.HeifImageFile


def limit(memory: int, cpu_s: int) -> None:
    """Let the system bound this process's memory and time, where it can.

    Args:
        memory: bytes beyond those that the process has taken.
        cpu_s: seconds of CPU since the process began.
    """
    # Windows has no such limits. There the parent's clock bounds the time.
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - pathlib is slow to load
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + memory
        # The hard limit stays, so that a process can ask for more once it knows its photo.
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _over_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
