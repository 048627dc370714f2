"""Finds photos that Pillow would read wrongly, and sound photos that it cannot read.

Pillow gives wrong pixels for some TIFFs, without an error. `Grey` corrects some of them, `refusal`
refuses the others. `foreign` and `rare` name a sound file that Pillow cannot read.
`tests/photos/test_formats.py` compares the whole matrix of variants with pixels that other
libraries stored. It is hand-written because Pillow does not say which variants it reads wrongly.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

__all__ = [
    "Grey",
    "foreign",
    "is_lossless_jpeg",
    "jpeg_frame",
    "jpeg_scan",
    "rare",
    "refusal",
    "without_text",
]

# Tags, by their names in TIFF 6.0.
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_STRIP_SIZES, _TILE_SIZES, _PLANAR, _COLOR_MAP, _SAMPLE_FORMAT = 279, 325, 284, 320, 339
_SUBSAMPLING = 530

_COLOURS = {
    0: "WhiteIsZero grey",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "transparency mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "camera raw",
    32844: "LogL",
    32845: "LogLuv",
    34892: "camera raw",
}
_SIGNS = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex float "}
_COMPRESSIONS = {
    *(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 32766, 32771, 32773, 32809, 32908, 32909, 32946, 33003, 33005),
    *(33007, 34661, 34676, 34677, 34712, 34887, 34892, 34925, 34926, 34927, 34933, 34934, 50000),
    *(50001, 50002, 52546),
}

_STRIP_PIXELS = 1_000_000

# Segments before a JPEG's scan: real files have a few dozen.
_MAX_JPEG_SEGMENTS = 10_000

# Bytes of EXIF and XMP in a PNG, when decompressed: Pillow's own limit.
_MAX_PNG_TEXT = 1 << 20

# Texts of a PNG that are read: each can take the time of a megabyte.
_MAX_PNG_TEXTS = 8

_ASK = "save it as JPEG, or as PNG or TIFF of 8 bits,"


@dataclass(frozen=True)
class Grey:
    """How the samples of one of Pillow's grey modes above 8 bits become brightness."""

    swapped: bool = False
    """Its bytes are in the opposite order to the one that Pillow assumes."""
    unsigned: bool = False
    """Unsigned 32-bit integers, for which Pillow has no mode."""
    inverted: bool = False
    """0 is white."""
    white: int = 65535
    """The 16-bit sample that is white."""
    sixteen: bool = False
    """Signed 16-bit samples, which Pillow holds in 32."""

    @classmethod
    def of(cls, image: Image.Image) -> "Grey":
        """Read it from the tags of an opened picture."""
        tags = getattr(image, "tag_v2", None)
        if tags is None:
            return cls()
        bits = tuple(tags.get(_BITS, (16,)))
        # libtiff gives samples in the processor's order, whatever the file's order is.
        through_libtiff = tags.get(_COMPRESSION, 1) != 1
        return cls(
            swapped=image.mode in ("I", "F") and through_libtiff and tags.prefix == b"MM",
            unsigned=image.mode == "I" and bits == (32,) and _first(tags, _SAMPLE_FORMAT, 1) == 1,
            inverted=tags.get(_PHOTOMETRIC, 0) == 0,
            white=4095 if bits == (12,) else 65535,
            sixteen=bits == (16,),
        )

    def values(self, image: Image.Image) -> NDArray[np.floating[Any]]:
        """The samples of (a part of) the picture, [height, width]."""
        stored = np.asarray(image)
        if image.mode not in ("I", "F"):
            return stored.astype(np.float32)
        if self.swapped:
            if image.mode == "I" and self.sixteen:
                stored = stored.astype(np.int16)
            stored = stored.byteswap()
        if self.unsigned:
            stored = stored.view(np.uint32)
        return stored.astype(np.float64)

    def ends(self, image: Image.Image) -> tuple[float, float] | None:
        """The values of black and of white; None if no sample is a number."""
        if image.mode in ("I", "F"):
            low, high = np.inf, -np.inf
            for strip in _strips(image):
                values = self.values(strip)
                finite = values[np.isfinite(values)]
                if finite.size:
                    low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            if low > high:
                return None
        else:
            low, high = 0.0, float(self.white)
        return (high, low) if self.inverted else (low, high)


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for row in range(0, image.height, rows):
        yield image.crop((0, row, image.width, min(row + rows, image.height)))


def _first(tags: ImageFileDirectory_v2, tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def foreign(data: bytes) -> str | None:
    """The name of a known format that the server does not read, by the file's first bytes."""
    brand, brands = data[8:12], data[8:64]
    if data[4:8] == b"ftyp":
        if brand in (b"avif", b"avis") or b"avif" in brands:
            return "AVIF"
        if brand[:3] in (b"hei", b"hev") or brand in (b"mif1", b"msf1"):
            return "HEIC"
        return "camera raw (CR3)" if brand == b"crx " else "video"
    for magic, name in (
        (b"GIF8", "GIF"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cJXL ", "JPEG XL"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"8BPS", "Photoshop (PSD)"),
        (b"%PDF", "PDF"),
        (b"II\xbc\x01", "JPEG XR"),
        (b"MM\0+", "BigTIFF in big-endian order"),
        (b"\0\0\x01\0", "ICO"),
        (b"v/1\x01", "OpenEXR"),
        (b"<svg", "SVG"),
    ):
        if data.startswith(magic):
            return name
    if re.match(rb"P[1-7]\s", data[:3]):
        return "PNM"
    # Explicit VR; the first attributes are of group 2 or 8.
    if re.match(rb"[\x02\x08]\0.\0[A-Z]{2}", data[:6], re.DOTALL):
        return "DICOM without its head (128 bytes and DICM)"
    return None


def jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """A JPEG's first frame header: marker (SOF0 is C0), bits a sample, components."""
    for marker, at in _jpeg_segments(data):
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return marker, data[at + 4], data[at + 9]
    return None


def jpeg_scan(data: bytes) -> int:
    """How many components a JPEG's first scan has; 0 if there is no scan."""
    return next((data[at + 4] for marker, at in _jpeg_segments(data) if marker == 0xDA), 0)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and place of each segment, up to the first scan."""
    at = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 10 > len(data):
            return
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD8:
            at += 2
        elif marker == 0xD9:
            return
        else:
            yield marker, at
            if marker == 0xDA:
                return
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def is_lossless_jpeg(data: bytes) -> bool:
    """Whether a JPEG is lossless (SOF3): such a file does not decode at reduced scale."""
    frame = jpeg_frame(data)
    return frame is not None and frame[0] == 0xC3


def without_text(png: bytes) -> bytes:
    """A PNG without its texts and colour profile: they are not used, and Pillow limits them.

    EXIF and XMP of a moderate length are kept, since they give the orientation.
    """
    kept, start, at, texts = [], 0, 8, 0
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if end > len(png):
            break
        kind = png[at + 4 : at + 8]
        drop = kind == b"iCCP"
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            named = png.startswith((b"XML:com.adobe.xmp\0", b"Raw profile type "), at + 8)
            texts += named
            drop = not (
                named and texts <= _MAX_PNG_TEXTS and _is_short_png_text(kind, png, at, end)
            )
        if drop:
            kept.append(png[start:at])
            start = end
        at = end
        if kind == b"IEND":
            break
    return b"".join([*kept, png[start:]]) if kept else png


def _is_short_png_text(kind: bytes, png: bytes, at: int, end: int) -> bool:
    body = png[at + 8 : min(end - 4, at + 8 + _MAX_PNG_TEXT)]
    text = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and not text.startswith(b"\1")):
        return end - at < _MAX_PNG_TEXT
    text = text[1:] if kind == b"zTXt" else b"".join(text[2:].split(b"\0", 2)[2:])
    inflate = zlib.decompressobj()
    try:
        inflate.decompress(text, _MAX_PNG_TEXT)
    except zlib.error:
        return False
    return not inflate.unconsumed_tail


def refusal(image: ImageFile.ImageFile, data: bytes) -> str | None:
    """What to tell the sender of a picture that Pillow would read wrongly; None if it reads it.

    It also corrects the transparent grey of a PNG of 2 or 4 bits: Pillow scales only the pixels.
    """
    if image.format == "PNG" and "transparency" in image.info:
        depth, colour = data[24], data[25]
        if depth == 16 and colour == 2:
            return (
                "This is a PNG of 16-bit RGB with a transparent colour, which is not read:"
                f" {_ASK} and send that."
            )
        if colour == 0 and depth in (2, 4):
            image.info["transparency"] *= 255 // ((1 << depth) - 1)
    if image.format != "TIFF":
        return None
    tags: ImageFileDirectory_v2 = image.tag_v2  # type: ignore[attr-defined]
    raw = tags.get(_COMPRESSION, 1) == 1
    photometric = tags.get(_PHOTOMETRIC, 0)
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 2 else 1
    width, height = tags[_WIDTH], tags[_LENGTH]
    wrong = (
        (image.mode == "L" and _first(tags, _SAMPLE_FORMAT, 1) == 2)
        # Pillow takes it for 8 bits.
        or (planes > 1 and raw and max(tags.get(_BITS, (1,))) > 8)
        # Pillow loses all planes but the first, or the signs of CIELab's.
        or (planes > 1 and photometric in (0, 1, 3, 8))
        # Pillow takes the reduced picture for the whole.
        or (photometric == 6 and raw and _is_subsampled(tags, width * height))
        # Pillow divides by 256, as if it had 16 bits.
        or (photometric == 3 and 0 < max(tags.get(_COLOR_MAP, (0,))) < 256)
    )
    return _told(tags) if wrong else None


def _is_subsampled(tags: ImageFileDirectory_v2, pixels: int) -> bool:
    if tuple(tags.get(_SUBSAMPLING, (1, 1))) != (1, 1):
        return True
    return sum(tags.get(_STRIP_SIZES) or tags.get(_TILE_SIZES) or (3 * pixels,)) < 3 * pixels


def rare(name: str, data: bytes, error: Exception) -> str | None:
    """What to tell the sender of a sound file that is not read; None if it may be damaged."""
    if name == "JPEG":
        frame = jpeg_frame(data)
        if frame is None:
            return None
        marker, bits, components = frame
        if marker == 0xF7:
            return (
                "This is a JPEG-LS image, which is not read: save it as JPEG or PNG and send that."
            )
        if bits in (*range(2, 8), *range(9, 17)) and components in (1, 2, 3, 4):
            kind = "lossless " if marker == 0xC3 else ""
            return (
                f"This is a {kind}JPEG of {bits}-bit samples, which is not read: {_ASK} and send"
                " that."
            )
        if marker not in (0xC0, 0xC1, 0xC2) and "truncated" not in str(error).lower():
            kind = {0xC3: "lossless", 0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}.get(
                marker, "hierarchical or lossless"
            )
            return (
                f"This {kind} JPEG does not decode (damaged, or a variant that is not read): save"
                " it anew as a baseline JPEG or as PNG."
            )
        if components not in (1, 3, 4) and bits == 8:
            return (
                f"This is a JPEG of {components} components, which is not read: {_ASK} and send"
                " that."
            )
    if name == "TIFF" and "truncated" not in str(error).lower():
        try:
            prefix = data[:16] if data[2:3] == b"+" else data[:8]
            tags, file = ImageFileDirectory_v2(prefix), BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            return _told(tags) if _is_sound(tags) else None
        except Exception:  # noqa: BLE001
            return None  # a damaged header can hold anything
    if name == "BMP" and (
        told := re.match(r"Unsupported BMP ([a-z ]+?)(?: \(\d+\))?$", str(error))
    ):
        return f"The BMP image has an unusual {told[1]}, which is not read: {_ASK} and send that."
    return None


def _is_sound(tags: ImageFileDirectory_v2) -> bool:
    """Whether every tag that describes the picture has a value that TIFF defines."""
    bits = tags.get(_BITS, (1,))
    return (
        tags.get(_WIDTH, 0) > 0
        and tags.get(_LENGTH, 0) > 0
        and tags.get(_PHOTOMETRIC) in _COLOURS
        and tags.get(_COMPRESSION, 1) in _COMPRESSIONS
        and tags.get(_PLANAR, 1) in (1, 2)
        and all(sample in range(1, 129) for sample in bits)
        and all(sample in range(1, 7) for sample in tags.get(_SAMPLE_FORMAT, (1,)))
        and tags.get(_SAMPLES, 1) in range(1, 1000)
        and (_STRIP_SIZES in tags or _TILE_SIZES in tags)
    )


def _told(tags: ImageFileDirectory_v2) -> str:
    bits, samples = _first(tags, _BITS, 1), tags.get(_SAMPLES, 1)
    sign = _SIGNS.get(_first(tags, _SAMPLE_FORMAT, 1), "")
    planar = "planar " if tags.get(_PLANAR, 1) == 2 and samples > 1 else ""
    colour = _COLOURS.get(tags.get(_PHOTOMETRIC, 0), "")
    of = f" of {samples} channels" if samples > 1 else ""
    return (
        f"This is a TIFF of {bits}-bit {sign}{planar}{colour}{of}, compression"
        f" {tags.get(_COMPRESSION, 1)}, which is not read: {_ASK} and send that."
    )
