"""Photos stored in every way that formats allow: the right pixels, or a refusal."""

import functools
import itertools
import struct
import zlib
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from photos.image import CorruptImageError, UnsupportedImageError, read_photo

HEIGHT, WIDTH = 100, 132
SIZE = 32


@functools.cache
def scene(channels: int) -> NDArray[np.float64]:
    """Smooth values from 0 to 1 without symmetry, so that a wrong turn, order or scale shows."""
    noise = np.random.default_rng(3).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(noise[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        for channel in range(channels)
    ]
    return np.stack([np.asarray(plane) / 255 for plane in planes], axis=-1)


def averaged(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """[height, width, 3] from 0 to 255 → the square that the network sees."""
    planes = [
        Image.fromarray(picture[..., channel].astype(np.float32)).resize(
            (SIZE, SIZE), Image.Resampling.BOX
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(plane, np.float64) for plane in planes], axis=-1)


def stretched(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((values - values.min()) / (values.max() - values.min()))


def stored(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values from 0 to 1 over the whole range of a type."""
    if dtype.kind == "f":
        return (values * 3000 - 1000).astype(dtype)
    info = np.iinfo(dtype)
    span = (float(info.max) - float(info.min)) * (1 - 1e-12)  # as 2^64 - 1 is no float
    return np.round(info.min + values * span).astype(dtype)


CODES: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate": {"compression": "zlib"},
    "deflate-predictor": {"compression": "zlib", "predictor": True},
    "lzw": {"compression": "lzw"},
    "packbits": {"compression": "packbits"},
    # Its higher levels take most of their time for a window of megabytes.
    "lzma": {"compression": "lzma", "compressionargs": {"level": 0}},
    "zstd": {"compression": "zstd"},
}
TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8")
KINDS = (
    "black",
    "white",
    "rgb",
    "rgba",
    "rgbp",
    "rgbx",
    "rgbxx",
    "grey-alpha",
    "cmyk",
    "lab",
    "ycbcr",
)
CHANNELS = {"black": 1, "white": 1, "rgb": 3, "grey-alpha": 2, "rgbxx": 5, "lab": 3, "ycbcr": 3}


def tiff(
    kind: str, dtype: str, order: Any, code: str, planar: bool, tiled: bool
) -> tuple[bytes, NDArray[np.float64]] | None:
    """A file and the square that it has to give; None where there is no such file."""
    channels = CHANNELS.get(kind, 4)
    values = scene(channels).copy()
    array = stored(values, np.dtype(dtype))
    if planar and channels == 1:
        return None
    kinds: dict[str, dict[str, Any]] = {
        "black": {"photometric": "minisblack"},
        "white": {"photometric": "miniswhite"},
        "rgb": {"photometric": "rgb"},
        "rgba": {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        "rgbp": {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        "rgbx": {"photometric": "rgb", "extrasamples": ["unspecified"]},
        "rgbxx": {"photometric": "rgb", "extrasamples": ["unspecified"] * 2},
        "grey-alpha": {"photometric": "minisblack", "extrasamples": ["unassalpha"]},
        "cmyk": {"photometric": "separated"},
        "lab": {"photometric": "cielab"},
        "ycbcr": {"photometric": "ycbcr", "subsampling": (1, 1)},
    }
    pages = kinds[kind]
    if kind == "rgbp":
        values[..., :3] *= values[..., 3:]
        array = stored(values, np.dtype(dtype))
        whole = values[..., :3] + 1 - values[..., 3:]
    elif kind == "rgba":
        whole = values[..., :3] * values[..., 3:] + 1 - values[..., 3:]
    elif kind == "grey-alpha":
        whole = (values[..., :1] * values[..., 1:] + 1 - values[..., 1:]).repeat(3, -1)
    elif kind == "cmyk":
        whole = (1 - values[..., :3]) * (1 - values[..., 3:])
    elif kind == "ycbcr":
        luma, blue, red = values[..., 0], values[..., 1] - 0.5, values[..., 2] - 0.5
        whole = np.stack(
            [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], -1
        ).clip(0, 1)
    elif kind == "lab":
        whole = values
        if dtype == "u1":
            square = np.asarray(
                Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("LAB")
            )
            array = square
            whole = np.asarray(Image.fromarray(square, "LAB").convert("RGB")) / 255
    else:
        whole = values[..., :3]
        if channels == 1:
            whole = whole.repeat(3, -1)
        if channels == 1 and dtype not in ("u1", "u2"):
            whole = stretched(array.astype(np.float64).repeat(3, -1))
        if kind == "white":
            whole = 1 - whole
    if planar:
        array = np.ascontiguousarray(array.transpose(2, 0, 1))
        pages["planarconfig"] = "separate"
    elif channels > 1:
        pages["planarconfig"] = "contig"
    else:
        array = array[..., 0]
    if tiled:
        pages["tile"] = (64, 48)
    else:
        pages["rowsperstrip"] = 30
    buffer = BytesIO()
    try:
        # Threads would take longer to start than a part of this size takes to pack.
        tifffile.imwrite(
            buffer, array, byteorder=order, metadata=None, maxworkers=1, **pages, **CODES[code]
        )
    except (ValueError, NotImplementedError, TypeError, RuntimeError):
        return None
    return buffer.getvalue(), averaged(whole * 255)


def outcome(data: bytes, expected: NDArray[np.float64]) -> str:
    try:
        read = read_photo(data, size=SIZE)
    except CorruptImageError as error:
        return f"refused: {error}"
    if (read.width, read.height) != (WIDTH, HEIGHT):
        return f"{read.width}×{read.height}"
    off = float(np.abs(read.pixels - expected).max())
    return "right" if off <= 4 else f"off by {off:.0f}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_is_read_rightly_or_named(kind: str, dtype: str) -> None:
    codes = CODES if dtype in ("u1", "u2", "f4") else ("none", "deflate", "lzw")
    seen = 0
    for order, code, planar, tiled in itertools.product("<>", codes, (False, True), (False, True)):
        made = tiff(kind, dtype, order, code, planar, tiled)
        if made is None:
            continue
        seen += 1
        told = outcome(*made)
        assert told == "right" or (
            "This is a TIFF of" in told and "save it as JPEG, or as PNG or TIFF of 8 bits" in told
        ), (order, code, planar, tiled, told)
    assert seen or kind in ("lab", "ycbcr")


@pytest.mark.parametrize(
    ("kind", "dtype", "order", "code"),
    [
        *(("rgb", "u1", order, code) for order in "<>" for code in CODES),
        *(("rgb", "u2", order, code) for order in "<>" for code in ("none", "deflate", "lzw")),
        *(
            ("black", dtype, ">", code)
            for dtype in ("i2", "i4", "f4")
            for code in ("none", "deflate", "lzw")
        ),
        *(("white", "u2", "<", code) for code in ("none", "deflate", "lzw")),
        ("white", "f4", ">", "deflate-predictor"),
        ("black", "u4", "<", "none"),
        ("black", "u4", "<", "deflate"),
        ("cmyk", "u1", "<", "lzw"),
        ("lab", "u1", "<", "none"),
    ],
)
def test_common_tiffs_are_read(kind: str, dtype: str, order: str, code: str) -> None:
    for tiled in (False, True):
        made = tiff(kind, dtype, order, code, False, tiled)
        assert made is not None
        assert outcome(*made) == "right"


@pytest.mark.parametrize("dtype", ["f4"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", "<>")
def test_nan_pixels_do_not_blacken_the_photo(dtype: str, odd: float, order: Any) -> None:
    values = scene(1)[..., 0]
    array = (values * 3000 - 1000).astype(dtype)
    array[:2, :2] = odd
    for code in ("none", "deflate"):
        buffer = BytesIO()
        tifffile.imwrite(buffer, array, byteorder=order, metadata=None, **CODES[code])
        pixels = read_photo(buffer.getvalue(), size=SIZE).pixels[3:, 3:]
        expected = averaged(stretched(scene(1)).repeat(3, -1) * 255)[3:, 3:]
        assert np.abs(pixels - expected).max() <= 4
    buffer = BytesIO()
    tifffile.imwrite(buffer, np.full_like(array, odd), metadata=None)
    with pytest.raises(CorruptImageError, match="is a number: save"):
        read_photo(buffer.getvalue())


def test_a_tiff_of_12_bits_is_read_rightly_or_named() -> None:
    refused: list[tuple[str, int]] = []
    told: set[bool] = set()
    for width, order, photometric in itertools.product((131, 132), "<>", (0, 1)):
        values = np.round(scene(1)[:, :width, 0] * 4095).astype(np.uint32)
        bits = np.unpackbits(
            values.astype(">u2").view(np.uint8).reshape(HEIGHT, width, 2), axis=-1
        )[..., 4:].reshape(HEIGHT, -1)
        data = np.packbits(bits, axis=1).tobytes()
        tags = [
            *((256, 4, 1, width), (257, 4, 1, HEIGHT), (258, 3, 1, 12), (259, 3, 1, 1)),
            *((262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, HEIGHT)),
            (279, 4, 1, len(data)),
        ]
        entries = b"".join(
            struct.pack(order + "HHI", tag, kind, count)
            + struct.pack(order + ("H2x" if kind == 3 else "I"), value)
            for tag, kind, count, value in tags
        )
        head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
        whole = head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)
        try:
            pixels = read_photo(whole, size=SIZE).pixels
        except CorruptImageError as error:
            refused.append((order, photometric))
            told.add("12-bit" in str(error))
            continue
        plane = Image.fromarray((values / 4095 * 255).astype(np.float32))
        expected = np.asarray(plane.resize((SIZE, SIZE), Image.Resampling.BOX))[..., None]
        assert np.abs(pixels - expected).max() <= 4, (width, order, photometric)
    assert ("<", 1) not in refused
    assert told == {True}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(picture: NDArray[Any], depth: int, colour: int, *extra: bytes, after: bytes = b"") -> bytes:
    """A PNG of [height, bytes a line] with chunks before and after its pixels."""
    lines = np.pad(picture, ((0, 0), (1, 0)))
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    width = picture.shape[1] * 8 // (depth * samples)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(picture), depth, colour, 0, 0, 0))
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + after
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_a_png_is_paper(depth: int) -> None:
    white = (1 << depth) - 1
    transparent = white // 3  # dark, and black where there are two
    values = np.full((HEIGHT, WIDTH), white, np.uint32)
    values[:, : WIDTH // 2] = transparent
    bits = np.unpackbits(values.astype(">u4").view(np.uint8).reshape(HEIGHT, WIDTH, 4), axis=-1)
    packed = np.packbits(bits[..., 32 - depth :].reshape(HEIGHT, -1), axis=1)
    plain = read_photo(png(packed, depth, 0), size=SIZE).pixels
    assert plain[:, :15].max() <= 90
    clear = png(packed, depth, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
    assert read_photo(clear, size=SIZE).pixels.min() == 255


def test_a_transparent_colour_of_a_png() -> None:
    colour = np.tile(np.array([10, 200, 30], np.uint8), (HEIGHT, WIDTH))
    trns = chunk(b"tRNS", struct.pack(">3H", 10, 200, 30))
    assert read_photo(png(colour, 8, 2, trns)).pixels.min() == 255
    wide = png(colour.repeat(2, axis=1), 16, 2, trns)
    with pytest.raises(CorruptImageError, match="PNG of 16-bit RGB with a transparent colour"):
        read_photo(wide)


TEXT = b"x" * (3 << 20)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0" + TEXT),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(TEXT)),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(TEXT)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(TEXT)),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(TEXT)),
        chunk(b"tEXt", b"Comment\0" + TEXT[: 1 << 20]) * 70,
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT[: 9 << 17])) * 50,
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT[: 1 << 19])) * 50,
    ],
    ids=["tEXt", "zTXt", "iTXt", "xmp", "exif", "iCCP", "many", "xmps", "short-xmps"],
)
def test_text_and_profiles_do_not_cost_a_png(extra: bytes) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 60), np.uint8)
    expected = read_photo(png(picture, 8, 2)).pixels
    assert np.array_equal(read_photo(png(picture, 8, 2, extra)).pixels, expected)
    assert np.array_equal(read_photo(png(picture, 8, 2, after=extra)).pixels, expected)


def test_thousands_of_packed_texts_are_refused() -> None:
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(TEXT[: 1 << 19]))
    picture = np.zeros((20, 60), np.uint8)
    with pytest.raises(CorruptImageError, match="packed texts or profiles"):
        read_photo(png(picture, 8, 2, packed * 2000))


def test_orientation_of_a_png_is_kept() -> None:
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for after in (False, True):
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        data = buffer.getvalue()
        raw = exif.tobytes()
        hexed = b"\nexif\n%8d\n" % len(raw) + raw.hex().encode() + b"\n"
        told = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed))
        at = data.index(b"IEND" if after else b"IDAT") - 4
        read = read_photo(data[:at] + told + data[at:])
        assert (read.width, read.height) == (20, 30)


@pytest.mark.parametrize("side", [100, 300, 700, 1500])
@pytest.mark.parametrize("grey", [False, True])
def test_lossless_jpeg_is_read_at_every_size(side: int, grey: bool) -> None:
    whole = scene(1 if grey else 3)
    picture = np.stack(
        [
            np.asarray(
                Image.fromarray(np.round(whole[..., channel] * 255).astype(np.uint8)).resize(
                    (side, side)
                )
            )
            for channel in range(whole.shape[-1])
        ],
        axis=-1,
    )
    data = bytes(imagecodecs.jpeg8_encode(picture[..., 0] if grey else picture, lossless=True))
    assert b"\xff\xc3" in data
    expected = Image.fromarray(picture.repeat(3, -1) if grey else picture).resize(
        (SIZE, SIZE), Image.Resampling.BOX
    )
    assert np.abs(read_photo(data, size=SIZE).pixels - np.asarray(expected, float)).max() <= 2


@pytest.mark.parametrize("bits", [12, 16])
def test_jpegs_of_more_bits_are_named(bits: int) -> None:
    picture = np.round(scene(1)[..., 0] * ((1 << bits) - 1)).astype(np.uint16)
    data = bytes(imagecodecs.ljpeg_encode(picture, bitspersample=bits))
    with pytest.raises(CorruptImageError, match=f"JPEG of {bits}-bit samples.*save it as"):
        read_photo(data)


def test_a_jpeg_ls_is_named() -> None:
    data = bytes(imagecodecs.jpegls_encode(np.zeros((20, 30), np.uint8)))
    with pytest.raises(CorruptImageError, match=r"JPEG-LS.*save it as"):
        read_photo(data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a", "GIF"),
        (b"GIF87a", "GIF"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"MM\0+\0\x08\0\0", "BigTIFF in big-endian order"),
    ],
)
def test_other_formats_are_named(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedImageError, match=f"{name}.*send JPEG, PNG, WEBP, TIFF"):
        read_photo(data + bytes(64))


def with_short(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF whose tag of one short has another value."""
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


@pytest.mark.parametrize(
    ("tag", "value", "named"),
    [
        (262, 32803, "camera raw"),
        (262, 34892, "camera raw"),
        (259, 34712, "compression 34712"),
        (339, 6, "complex float"),
    ],
)
def test_a_sound_tiff_that_is_not_read_is_not_called_damaged(
    tag: int, value: int, named: str
) -> None:
    buffer = BytesIO()
    tifffile.imwrite(buffer, np.zeros((20, 30), np.int16), byteorder="<", metadata=None)
    with pytest.raises(CorruptImageError, match=f"{named}.*which is not read: save it as"):
        read_photo(with_short(buffer.getvalue(), tag, value))
