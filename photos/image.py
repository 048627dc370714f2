"""Photo bytes → the network's square pixels, and its probability map → a mask at the photo's size.

Training, evaluation and serving use these functions, so all of them give the same mask. Needs numpy
and Pillow only.

    photo = read_photo(data)                                  # bytes → uint8 [128, 128, 3]
    mask = lesion_mask(probability, photo.width, photo.height)  # float32 [128, 128] → packed bits
    png = encode_png(mask, photo.width, photo.height)

Errors:

    ImageError (ValueError)      the message tells the sender what to do
    ├── UnsupportedImageError    the format is not one of FORMATS
    │   └── NoDecoderError       it is AVIF, HEIC or DICOM, and the decoder is not installed
    ├── ImageTooLargeError       the header names more pixels than allowed
    └── CorruptImageError        the photo does not decode
"""

import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from photos import formats, heif, pixels, structure
from photos.dicom import process as dicom
from photos.pictures import UPRIGHT, over_white

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FORMATS",
    "MODEL_SIZE",
    "THRESHOLD",
    "UPRIGHT",
    "CorruptImageError",
    "ImageError",
    "ImageTooLargeError",
    "JpegReader",
    "NoDecoderError",
    "Photo",
    "Room",
    "UnsupportedImageError",
    "always_room",
    "encode_grey_png",
    "encode_png",
    "is_baseline_jpeg",
    "jpeg_scans",
    "lesion_mask",
    "read_photo",
    "unpack_mask",
    "upsampled",
]

MODEL_SIZE = 128
"""Side of the network's square input, pixels."""

THRESHOLD = 0.5
"""Default probability above which a pixel is lesion."""

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
"""Formats that are read everywhere, by Pillow's names. Beside them `photos.heif` reads AVIF and
HEIC, and `photos.dicom` DICOM, where their decoders are installed. Pillow's other decoders never
run in this process."""

DEFAULT_MAX_PIXELS = 64_000_000
"""Enough for 61-megapixel sensors (9504×6336). A decoded photo takes up to 4 bytes a pixel, twice
that while it is rotated, four times in WebP (libwebp's two canvases and their copies). A JPEG is
decoded at reduced scale, but a progressive one holds its coefficients, up to 6 bytes a pixel."""

# JPEG's own limit. Without it, the mask of a picture of one row could need a thousand times the
# memory of a photo's.
_MAX_SIDE = 65_535

# A JPEG is decoded at the smallest scale that gives, along each side, this many pixels for one of
# the network's. With less than two, averaging takes some lines alone and others in pairs. On native
# dermoscopic photos the network's pixels are then 2.5 levels (of 255) off those of a whole decode.
# With two it is 1.0, and takes half a millisecond more at 1024×768 and no more at 6000×4000.
_JPEG_MARGIN = 2

# Components of a usual JPEG: name, samples across and down. Brightness may have more than colours.
_BRIGHTNESS = ((1, 1, 1), (1, 2, 1), (1, 2, 2))
_COLOURS = [(2, 1, 1), (3, 1, 1)]

# Pixels converted to RGB at a time.
_STRIP_PIXELS = 1_000_000

# Bytes of a mask interpolated at a time: their floats stay in cache.
_MASK_BYTES = 1 << 13

# Samples of a probability map up-sampled at a time, for the same reason.
_SAMPLES_AT_ONCE = 1 << 17

# PNG's filter that stores the difference from the line above.
_UP = 2

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"BM", "BMP"),
)

_ORIENTATION_TAG = 0x0112

# Pillow warns of damaged metadata and of large pictures. This module checks both itself. A warning
# whose text has a number from the file would stay in Python's registry of warnings for ever.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """A photo that cannot be used. The message says why and what its sender can do."""


class UnsupportedImageError(ImageError):
    """The bytes are not of a format in `FORMATS`."""


class NoDecoderError(UnsupportedImageError):
    """The decoder of this format is not installed."""


class ImageTooLargeError(ImageError):
    """The picture has more pixels than allowed, or needs more memory than there is."""


class CorruptImageError(ImageError):
    """The format is known, but the picture does not decode."""


@dataclass(frozen=True)
class Photo:
    """A photo at the network's size, and the size that it had."""

    pixels: NDArray[np.uint8]
    """uint8 [size, size, 3], RGB: the whole frame squashed to a square."""
    width: int
    """Pixels, after EXIF orientation."""
    height: int
    """Pixels, after EXIF orientation."""
    orientation: int
    """EXIF orientation that was applied to the stored picture, 1 to 8 (EXIF 2.32, tag 0x0112)."""
    spacing: dicom.Spacing | None = None
    """Millimetres of a pixel, across and down, where the photo tells them: only DICOM does."""
    frame: int | None = None
    """Which frame of the file it is, as it was asked for."""


Room = Callable[[int], AbstractContextManager[None]]
"""Gets a number of pixels; what it returns is entered before memory is taken for them."""


JpegReader = Callable[[bytes, int, int], NDArray[np.uint8] | None]
"""Gets a usual JPEG, its EXIF orientation and a side. Returns the upright frame averaged to
uint8 [side, side, 3] RGB, or None where Pillow has to read it."""


def always_room(_pixels: int) -> AbstractContextManager[None]:
    """Room for any number of pixels."""
    return nullcontext()


def read_photo(
    data: bytes,
    *,
    size: int = MODEL_SIZE,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    room: Room = always_room,
    frame: int | None = None,
    jpeg: JpegReader | None = None,
) -> Photo:
    """Decode a photo of any size to `size`×`size` RGB by area average (Pillow's BOX filter).

    The header gives format and pixel count, before anything is decoded. JPEG is decoded at the
    smallest DCT scale whose sides are both ≥ 2 `size`. EXIF orientation is applied, to width and
    height too. Any mode becomes RGB. Transparency lies over white. 12- and 16-bit grey is scaled to
    8 bits. Signed, 32-bit and float grey, which has no defined white, is stretched from its least
    to its greatest number. Embedded colour profiles are ignored. The first of several frames or
    pages is taken, except of DICOM, whose object has to have one frame if `frame` does not name
    one, from 1. AVIF, HEIC and DICOM are decoded in a process of their own. Safe to call from
    several threads.

    `room` gets the number of pixels and returns a context manager. It is entered before memory is
    taken for the pixels, so that photos that are decoded at once can wait for each other there.
    `jpeg` decodes usual JPEG files in Pillow's place, after all checks of the header.

    Raises:
        UnsupportedImageError: the format is not one of `FORMATS`, nor AVIF, HEIC or DICOM with
            their decoders installed; or a DICOM object is no photo.
        ImageTooLargeError: there are more than 65,535 pixels a side, or more than `max_pixels` (or
            than Pillow's own limit, 178,956,970).
        CorruptImageError: the photo is truncated, damaged, or stored in a way that is not read: see
            `photos.formats`.
        ImageError: it is not known which frame is meant.
    """
    name = _sniff(data)
    if frame is not None and name != dicom.NAME:
        raise ImageError(f"frame={frame} is for DICOM, and this is a {name} image: leave it out.")
    # Hostile bytes can raise anything in an image library (OSError, SyntaxError, struct.error,
    # zlib.error, KeyError, RuntimeError, …). To the sender all of it means the same.
    try:
        return _decode(name, data, size, max_pixels, room, frame, jpeg)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow found it too large before its size could be read here.
        size_told = re.search(r"\d+", str(error))
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageTooLargeError(
            f"The image has {size_told[0] if size_told else 'too many'} pixels, {most} are"
            " allowed: send a smaller version of it."
        ) from error
    except structure.TakesTooLongError as error:
        raise CorruptImageError(
            f"The {name} image takes too long to decode: save it anew as a baseline JPEG."
        ) from error
    except MemoryError as error:
        raise ImageTooLargeError(
            f"The {name} image takes more memory to decode than there is: send a smaller one."
        ) from error
    except Exception as error:
        raise CorruptImageError(_why_corrupt(name, data, error)) from error


def _decode(
    name: str,
    data: bytes,
    size: int,
    max_pixels: int,
    room: Room,
    frame: int | None,
    jpeg: JpegReader | None,
) -> Photo:
    """`read_photo` of the format `name`; it also raises whatever the libraries below raise."""
    if name in heif.FORMATS:
        return _decode_heif(name, data, size, max_pixels, room)
    if name == dicom.NAME:
        return _decode_dicom(data, size, max_pixels, room, frame)
    with ExitStack() as held:
        if name == "WEBP":
            # libwebp allocates its canvases on opening, so the size is checked before.
            webp_size = _webp_size(data)
            _check_pixels(*webp_size, max_pixels)
            held.enter_context(room(math.prod(webp_size)))
        odd = structure.check(name, data, jpeg_scans(data) if name == "JPEG" else 0)
        if odd:
            raise _odd(name, odd)
        if name == "PNG":
            data = formats.without_text(data)
        file = structure.metered(data)
        with Image.open(file, formats=(name,)) as image:
            structure.header_is_read(file)
            width, height = image.size
            _check_pixels(width, height, max_pixels)
            if name != "WEBP":
                held.enter_context(room(width * height))
            if (refusal := formats.refusal(image, data)) is not None:
                raise CorruptImageError(refusal)
            if jpeg is not None and name == "JPEG" and _is_usual_jpeg(image, data):
                orientation = _orientation(image)
                if (found := jpeg(data, orientation, size)) is not None:
                    return Photo(found, *_upright_sides(width, height, orientation), orientation)
            if name != "JPEG" or not formats.is_lossless_jpeg(data):
                image.draft("RGB", (_JPEG_MARGIN * size, _JPEG_MARGIN * size))
            grey = formats.Grey.of(image)
            # Pillow turns a TIFF upright while it loads it.
            applied = _orientation(image) if name == "TIFF" else 1
            image.load()
            # Read after loading, since a PNG may store it behind the pixels.
            orientation = _orientation(image)
            # Pillow's BOX is not symmetric. Turned before averaging, the pixels are exactly those
            # of the same photo stored upright. A JPEG is small by now.
            upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
            square = _squash(upright, size, grey)
    sides = _upright_sides(width, height, orientation)
    return Photo(square, *sides, applied if name == "TIFF" else orientation)


def _upright_sides(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if 5 <= orientation <= 8 else (width, height)


def _decode_heif(name: str, data: bytes, size: int, max_pixels: int, room: Room) -> Photo:
    if missing := heif.missing(name):
        raise NoDecoderError(missing)
    try:
        told = heif.header(data)
    except structure.OddError as odd:
        raise _odd(name, str(odd)) from odd
    if told is None:
        raise CorruptImageError(
            f"The {name} image has a damaged header, or no still picture: send the original photo."
        )
    for width, height in told.every:
        _check_pixels(width, height, max_pixels)
    with room(told.most_pixels):
        square, width, height = heif.decode(name, data, size, told)
    return Photo(square, width, height, told.orientation)


def _decode_dicom(data: bytes, size: int, max_pixels: int, room: Room, frame: int | None) -> Photo:
    if missing := dicom.missing():
        raise NoDecoderError(missing)
    try:
        with dicom.opened(data, size, frame) as found:
            _check_pixels(found.width, found.height, max_pixels)
            with room(found.width * found.height):
                square = found.decode(size)
    except dicom.RefusedError as refused:
        kind = UnsupportedImageError if refused.is_kind else CorruptImageError
        raise kind(str(refused)) from refused
    return Photo(square, found.width, found.height, 1, found.spacing, frame)


def _odd(name: str, odd: str) -> CorruptImageError:
    return CorruptImageError(
        f"The {name} image has {odd}, which no photo needs: save it anew as a baseline JPEG or a"
        " PNG, without its metadata."
    )


def is_baseline_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG of one scan: its pixels alone bound the time to decode it."""
    return data.startswith(_MAGIC[0][0]) and jpeg_scans(data) == 1


def _is_usual_jpeg(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether it is as cameras write it and has its end, so that decoders agree about it.

    It has 8 bits of YCbCr in one scan, sequential and Huffman-coded, and its colours are 4:4:4,
    4:2:2 or 4:2:0. One on a GPU may take a file that is cut off for a whole one. Where no marker
    says what the colours are, decoders guess it by the names of the components.
    """
    components = [component[:3] for component in getattr(image, "layer", ())]
    frame = formats.jpeg_frame(data)
    return (
        image.mode == "RGB"
        and components[1:] == _COLOURS
        and components[0] in _BRIGHTNESS
        and image.info.get("adobe_transform", 1) == 1
        and frame is not None
        and frame[:2] in ((0xC0, 8), (0xC1, 8))
        and data.endswith(b"\xff\xd9")
        and is_baseline_jpeg(data)
        and formats.jpeg_scan(data) == len(components)
    )


def lesion_mask(
    probability: NDArray[np.float32], width: int, height: int, threshold: float = THRESHOLD
) -> NDArray[np.uint8]:
    """The mask at the photo's size: `probability` up-sampled, then `> threshold`.

    Up-sampling is bilinear, with half-pixel centres and clamped edges. The probabilities at the
    photo's size are never formed. Between two source rows a pixel's value lies between those of the
    two, so only columns where the rows are on different sides of the threshold are interpolated.

    Args:
        probability: float32 [rows, columns], usually [128, 128].
        width: the photo's, pixels.
        height: the photo's, pixels.
        threshold: probability above which a pixel is lesion.

    Returns:
        uint8 [height, ceil(width / 8)]: eight pixels a byte, the leftmost in the highest bit,
        lesion 1; padding bits are 0. See `unpack_mask`.
    """
    mask = pixels.mask(probability, width, height, threshold)
    if mask is None:
        mask = _mask(probability, width, height, threshold)
    if width % 8:
        mask[:, -1] &= 0xFF << (8 - width % 8) & 0xFF
    return mask


def upsampled(
    probability: NDArray[np.float32], width: int, height: int, lines: int
) -> Iterator[NDArray[np.float32]]:
    """`probability` at the photo's size, as in `lesion_mask`, so many lines at a time.

    Args:
        probability: float32 [rows, columns], usually [128, 128].
        width: the photo's, pixels.
        height: the photo's, pixels.
        lines: number of the photo's lines in each step; the last step may have fewer.

    Yields:
        float32 [lines, width]
    """
    left, across = _sample_positions(width, probability.shape[1], width)
    rows = _between_columns(probability, left, across)
    top, down = _sample_positions(height, probability.shape[0], height)
    below = np.minimum(top + 1, len(rows) - 1)
    for line in range(0, height, lines):
        part = slice(line, line + lines)
        upper = rows[top[part]]
        strip = rows[below[part]]
        strip -= upper
        strip *= down[part, None]
        strip += upper
        yield strip


def unpack_mask(packed: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Packed bits as `lesion_mask` returns them → bool [height, width]."""
    return np.unpackbits(packed, axis=1, count=width).view(np.bool_)


def encode_png(packed: NDArray[np.uint8], width: int, height: int) -> bytes:
    """Packed bits as `lesion_mask` returns them → a 1-bit greyscale PNG, lesion white.

    It is hand-written (PNG, W3C Recommendation, third edition) because packed bits already are
    PNG's own sample layout. Each line differs little from the one above. The "Up" filter makes runs
    of zeros of that, which zlib passes over at its fastest setting.
    """
    if packed.shape != (height, -(-width // 8)):
        raise ValueError(
            f"packed mask has shape {packed.shape}, but {width}×{height} pixels take"
            f" {(height, -(-width // 8))}"
        )
    lines = np.empty((height, packed.shape[1] + 1), np.uint8)
    lines[:, 0] = _UP
    lines[0, 1:] = packed[0]
    np.subtract(packed[1:], packed[:-1], out=lines[1:, 1:])
    return _png(width, height, 1, [lines])


def encode_grey_png(
    probability: NDArray[np.float32], width: int, height: int, bits: Literal[8, 16]
) -> bytes:
    """A probability map at the photo's size → a greyscale PNG, white for 1.

    It is hand-written as `encode_png` is, and so that the map is never whole in memory: it is
    up-sampled, rounded and compressed some lines at a time.

    Args:
        probability: float32 [rows, columns], usually [128, 128].
        width: the photo's, pixels.
        height: the photo's, pixels.
        bits: of a sample.
    """
    lines = max(1, _SAMPLES_AT_ONCE // width)

    def filtered() -> Iterator[NDArray[np.uint8]]:
        before = np.zeros((1, width * bits // 8), np.uint8)
        for strip in upsampled(probability, width, height, lines):
            strip *= (1 << bits) - 1
            # 16-bit samples have their higher byte first.
            samples = np.rint(strip).astype(f">u{bits // 8}").view(np.uint8)
            rows = np.concatenate([before, samples])
            before = samples[-1:]
            up = np.empty((len(samples), 1 + samples.shape[1]), np.uint8)
            up[:, 0] = _UP
            np.subtract(rows[1:], rows[:-1], out=up[:, 1:])
            yield up

    return _png(width, height, bits, filtered())


def _png(width: int, height: int, bits: int, lines: Iterable[NDArray[np.uint8]]) -> bytes:
    """A greyscale PNG of filtered lines, each with its filter's type before it."""
    compressor = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    pixels = b"".join([*(compressor.compress(part.data) for part in lines), compressor.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def _sniff(data: bytes) -> str:
    """The format by its first bytes, as Pillow names it."""
    if not data:
        raise CorruptImageError("The image is empty (0 bytes): send the bytes of a photo.")
    # The first 128 bytes are any program's to use: some make the file a TIFF as well.
    if dicom.is_dicom(data):
        return dicom.NAME
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    known = formats.foreign(data)
    if known in heif.FORMATS:
        return known
    what = (
        f"This is a file of the format {known}, which is not read"
        if known
        else "The bytes are not an image of a known format"
    )
    *most, last = _readable()
    raise UnsupportedImageError(f"{what}: send {', '.join(most)} or {last}.")


def _readable() -> list[str]:
    """The formats that are read here, with those whose decoders are installed."""
    dicoms = [] if dicom.missing() else [dicom.NAME]
    return [*FORMATS, *(name for name in heif.FORMATS if not heif.missing(name)), *dicoms]


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLargeError(
            f"The image has {width}×{height} pixels, {_MAX_SIDE} a side are allowed: send a"
            " smaller version of it."
        )
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image has {width}×{height} = {width * height} pixels, {max_pixels} are allowed:"
            " send a smaller version of it."
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas of a WebP file from its first chunk (RFC 9649), pixels; 0×0 if there is none."""
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8X" and len(head) == 10:
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L" and len(head) >= 5:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(head) == 10:
        width, height = struct.unpack("<HH", head[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def jpeg_scans(data: bytes) -> int:
    """How many scans the picture has, by its markers up to the end of image (ITU-T T.81, B.1.1).

    Segments are skipped by their length, and what follows the picture is not read. Maker notes,
    previews and the film that phones append hold marker bytes by chance.
    """
    compiled = pixels.scans(data)
    if compiled is not None:
        return compiled
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values[:-1] == 0xFF)
    code = values[at + 1]
    # Skip stuffed (00) and fill bytes (FF), and markers without a length, as libjpeg does.
    at = at[(code >= 0xC0) & ((code < 0xD0) | (code > 0xD8)) & ((code < 0xF0) | (code == 0xFE))]
    scans = 0
    position = 2  # after the start of image
    while (i := int(np.searchsorted(at, position))) < len(at):
        position = int(at[i])
        marker = data[position + 1]
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return scans


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        exif = image.info.get("exif")
        if exif is None and "Raw profile type exif" in image.info:
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        immodest = exif is not None and not structure.is_modest_exif(exif)
        tag = 1 if immodest else int(image.getexif().get(_ORIENTATION_TAG, 1))
        orientation = tag if tag in UPRIGHT else 1
    except Exception:  # noqa: BLE001
        # EXIF is damaged and the pixels are sound: take the picture as it is stored.
        return 1
    if immodest:
        raise CorruptImageError(
            f"The {image.format} image has EXIF metadata as no photo has: send it without them."
        )
    return orientation


def _squash(image: Image.Image, size: int, grey: formats.Grey) -> NDArray[np.uint8]:
    """The whole frame by area average, uint8 [size, size, 3].

    Other modes than RGB are converted a strip at a time, so that memory never holds a second
    picture of the photo's size.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        compiled = pixels.squash(image, size)
        if compiled is not None:
            return compiled
        return np.array(image.resize((size, size), Image.Resampling.BOX))
    ends = grey.ends(image)
    if ends is None:
        raise CorruptImageError(
            "No sample of the image is a number: save it as JPEG, PNG or TIFF of 8 bits."
        )
    black, white = ends
    square = Image.new("RGB", (size, size))
    scale = image.height / size
    step = max(1, min(size, int(_STRIP_PIXELS / (image.width * scale))))
    for row in range(0, size, step):
        rows = min(step, size - row)
        upper, lower = row * scale, min((row + rows) * scale, image.height)
        first, last = int(upper), min(int(np.ceil(lower)), image.height)
        strip = _to_rgb(image.crop((0, first, image.width, last)), grey, black, white)
        box = (0, upper - first, image.width, lower - first)
        square.paste(strip.resize((size, rows), Image.Resampling.BOX, box), (0, row))
    return np.array(square)


def _to_rgb(image: Image.Image, grey: formats.Grey, black: float, white: float) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = grey.values(image)
        scaled = np.nan_to_num((values - black) * (255 / ((white - black) or 1)))
        if "transparency" in image.info:
            scaled[values == image.info["transparency"]] = 255
        return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    return over_white(image)


def _why_corrupt(name: str, data: bytes, error: Exception) -> str:
    if (rare := formats.rare(name, data, error)) is not None:
        return rare
    if "truncated" in str(error).lower():
        return f"The {name} image ends too early (truncated): send the whole file again."
    if isinstance(error, UnidentifiedImageError):
        return f"The {name} image has a damaged header: send the original file again."
    return (
        f"The {name} image does not decode (damaged, or an unusual variant of the format): send"
        " the original file again, or save it anew as JPEG or PNG."
    )


def _mask(
    probability: NDArray[np.float32], width: int, height: int, threshold: float
) -> NDArray[np.uint8]:
    """`lesion_mask` in numpy, where it is not compiled; its padding bits may be 1."""
    stride = -(-width // 8)
    # Up to a whole byte.
    left, across = _sample_positions(width, probability.shape[1], stride * 8)
    rows = _between_columns(probability, left, across)  # [rows, stride * 8]

    packed = np.packbits(rows > threshold, axis=1)  # [rows, stride]
    top, down = _sample_positions(height, probability.shape[0], height)
    mask = packed.take(top, axis=0)
    # A line between two source rows may differ from the upper one in these bytes alone.
    row, byte = np.nonzero(packed[:-1] ^ packed[1:])
    # The lines of a source row; those above the centre of the first row repeat it.
    first = np.searchsorted(top, np.arange(len(rows)))
    first[0] = np.count_nonzero(down[: np.searchsorted(top, 1)] == 0)
    count = np.searchsorted(top, np.arange(len(rows)), side="right") - first
    row, byte = row[count[row] > 0], byte[count[row] > 0]
    if row.size:
        lines = rows.reshape(len(rows), stride, 8)
        # All bands are as long as the longest; shorter ones repeat their last line.
        line = np.minimum(np.arange(count[row].max()), count[:, None] - 1) + first[:, None]
        weight = down.take(line, mode="clip")[..., None]
        step = max(1, _MASK_BYTES // line.shape[1])
        for part in (slice(start, start + step) for start in range(0, row.size, step)):
            at, bytes_ = row[part], byte[part]
            upper = lines[at, bytes_][:, None]  # [bytes, 1, 8]
            above = upper + (lines[at + 1, bytes_][:, None] - upper) * weight[at] > threshold
            mask[line[at], bytes_[:, None]] = np.packbits(above, axis=2)[..., 0]
    return mask


def _between_columns(
    probability: NDArray[np.float32], left: NDArray[np.intp], across: NDArray[np.float32]
) -> NDArray[np.float32]:
    columns = probability.astype(np.float32, copy=False)
    rows = columns.take(left, axis=1)
    rows += (columns.take(np.minimum(left + 1, columns.shape[1] - 1), axis=1) - rows) * across
    return rows


def _sample_positions(
    length: int, source: int, count: int
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """For `count` output pixels: the source pixel before each, and the share of the next one.

    `length` of the output pixels span the `source` ones.
    """
    position = (np.arange(count) + 0.5) * (source / length) - 0.5
    position = position.clip(0, source - 1)
    before = position.astype(np.intp)
    return before, (position - before).astype(np.float32)
