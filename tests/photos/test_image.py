"""What a sender may send, what the network then sees, and what mask comes back."""

import random
import struct
import threading
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from photos import heif
from photos.dicom import process
from photos.image import (
    FORMATS,
    MODEL_SIZE,
    CorruptImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
    encode_png,
    lesion_mask,
    read_photo,
    unpack_mask,
)
from tests.support.samples import Sample

WIDTH, HEIGHT = 320, 240


def encode(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def squashed(image: Image.Image, size: int = MODEL_SIZE) -> NDArray[np.int16]:
    """The naive way to the network's pixels: everything decoded, converted, then averaged."""
    square = image.convert("RGB").resize((size, size), Image.Resampling.BOX)
    return np.asarray(square).astype(np.int16)


def difference(pixels: NDArray[np.uint8], expected: NDArray[np.int16]) -> float:
    return float(np.abs(pixels - expected).mean())


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth random colours, no symmetry, so that a wrong turn or channel order shows."""
    noise = np.random.default_rng(7).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pixels(photo: Image.Image, name: str) -> None:
    read = read_photo(encode(photo, name))
    assert (read.width, read.height) == (WIDTH, HEIGHT)
    assert read.pixels.shape == (MODEL_SIZE, MODEL_SIZE, 3)
    assert read.pixels.dtype == np.uint8
    lossy = name in ("JPEG", "WEBP")
    assert difference(read.pixels, squashed(photo)) <= (4 if lossy else 0)


@pytest.mark.parametrize("name", ["GIF", "PPM", "ICO", "TGA", "JPEG2000", "PDF"])
def test_other_formats_are_refused_though_pillow_reads_them(photo: Image.Image, name: str) -> None:
    with pytest.raises(UnsupportedImageError, match="send JPEG, PNG, WEBP, TIFF"):
        read_photo(encode(photo, name))


@pytest.mark.parametrize(
    ("installed", "told"),
    [([], "TIFF or BMP"), (["AVIF"], "BMP or AVIF"), (["AVIF", "HEIC", "DICOM"], "HEIC or DICOM")],
)
def test_a_refusal_names_what_is_read_here(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], told: str
) -> None:
    def missing(name: str = "DICOM") -> str | None:
        return None if name in installed else "not here"

    monkeypatch.setattr(heif, "missing", missing)
    monkeypatch.setattr(process, "missing", missing)
    with pytest.raises(UnsupportedImageError, match=rf" {told}\.$"):
        read_photo(b"GIF89a" + bytes(64))


@pytest.mark.parametrize("data", [b"hello", b"<svg/>", b"\xff\xd8", b"RIFF\0\0\0\0WAVEfmt "])
def test_text_and_the_like_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImageError):
        read_photo(data)


def test_empty_bytes_are_refused() -> None:
    with pytest.raises(CorruptImageError, match="empty"):
        read_photo(b"")


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "LAB", "YCbCr"])
def test_every_mode_becomes_rgb(photo: Image.Image, mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(photo.convert("L")).astype(np.uint16)
        stored, expected = Image.fromarray(grey * 257), squashed(photo.convert("L"))
    elif mode == "P":
        stored = photo.quantize(256)
        expected = squashed(stored)
    else:
        stored = photo.convert(mode)
        expected = squashed(stored)
    pixels = read_photo(encode(stored, "PNG" if mode in ("P", "LA", "RGBA") else "TIFF")).pixels
    # YCbCr in TIFF is stored with its own rounding.
    assert difference(pixels, expected) <= (2 if mode in ("LAB", "YCbCr") else 0.51)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(name: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    pixels = read_photo(encode(Image.fromarray(ramp), name)).pixels
    rows = pixels.mean(axis=(1, 2))
    assert rows[0] < 2
    assert rows[-1] > 253
    assert np.all(np.diff(rows) >= 0)
    assert rows[64] == pytest.approx(128, abs=2)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_white_is_stretched(dtype: type[np.generic]) -> None:
    ramp = np.linspace(-1000, 3000, 256 * 256).astype(dtype).reshape(256, 256)
    rows = read_photo(encode(Image.fromarray(ramp), "TIFF")).pixels.mean(axis=(1, 2))
    assert (rows[0], rows[-1]) == (pytest.approx(1, abs=1), pytest.approx(254, abs=1))
    assert rows[64] == pytest.approx(128, abs=2)


def test_flat_grey_without_a_white_is_read() -> None:
    flat = Image.fromarray(np.full((130, 130), 7, np.int32))
    assert read_photo(encode(flat, "TIFF")).pixels.max() == 0


def test_cmyk_jpeg_has_the_right_colours(photo: Image.Image) -> None:
    # Adobe stores CMYK inverted in JPEG, and so does Pillow.
    pixels = read_photo(encode(photo.convert("CMYK"), "JPEG", quality=95)).pixels
    assert difference(pixels, squashed(photo)) < 4


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_over_white(photo: Image.Image, name: str) -> None:
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    pixels = read_photo(encode(clear, name, **options)).pixels
    paper = Image.new("RGB", photo.size, "white")
    paper.paste(photo, mask=clear.getchannel("A"))
    assert difference(pixels, squashed(paper)) < 1
    assert pixels[0].min() >= 250  # wholly transparent


def test_a_transparent_palette_colour_lies_over_white(photo: Image.Image) -> None:
    pixels = read_photo(encode(photo.quantize(4), "PNG", transparency=0)).pixels
    assert difference(pixels, squashed(photo.quantize(4))) > 10
    assert (pixels == 255).all(axis=2).any()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_pixels_and_size(
    photo: Image.Image, name: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = read_photo(encode(photo, name, exif=exif))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    upright = photo.transpose(turn[orientation]) if orientation > 1 else photo
    assert (read.width, read.height) == upright.size
    assert read.orientation == orientation
    lossy = name in ("JPEG", "WEBP")
    assert difference(read.pixels, squashed(upright)) <= (4 if lossy else 0)


def test_damaged_exif_does_not_cost_the_photo(photo: Image.Image) -> None:
    data = encode(photo, "PNG", exif=b"Exif\0\0nonsense")
    assert difference(read_photo(data).pixels, squashed(photo)) == 0


@pytest.mark.parametrize("name", ["PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken(photo: Image.Image, name: str) -> None:
    later = [photo.rotate(90), photo.rotate(180)]
    data = encode(photo, name, save_all=True, append_images=later)
    assert difference(read_photo(data).pixels, squashed(photo)) < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (127, 129), (128, 128), (2000, 130)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_any_shape_is_squashed_whole(size: tuple[int, int], mode: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    read = read_photo(encode(image, "PNG"))
    assert (read.width, read.height) == size
    assert np.array_equal(read.pixels, squashed(image))


def test_a_converted_photo_larger_than_one_strip_equals_the_whole() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (1301, 1703), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert np.array_equal(read_photo(encode(image, "BMP")).pixels, squashed(image))


@pytest.mark.parametrize("size", [64, 256])
def test_other_network_sizes(photo: Image.Image, size: int) -> None:
    assert np.array_equal(read_photo(encode(photo, "PNG"), size=size).pixels, squashed(photo, size))


def test_jpeg_scaled_while_decoding_is_the_same_picture(photo: Image.Image) -> None:
    large = photo.resize((1920, 1440), Image.Resampling.BICUBIC)
    read = read_photo(encode(large, "JPEG", quality=95))
    assert (read.width, read.height) == (1920, 1440)
    assert difference(read.pixels, squashed(large)) < 2


def test_photos_from_cameras(photos: list[Sample]) -> None:
    differences = []
    for sample in photos:
        read = read_photo(sample.data)
        assert (read.height, read.width) == sample.mask.shape
        with Image.open(BytesIO(sample.data)) as image:
            differences.append(difference(read.pixels, squashed(image)))
    # Decoding at reduced scale costs a little: hairs and skin lines are thinner than its pixels.
    assert max(differences) < 4
    assert np.mean(differences) < 2


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part", range(1, 11))
def test_truncated_anywhere_is_corrupt(photo: Image.Image, name: str, part: int) -> None:
    data = encode(photo, name)
    cut = len(data) * part // 11
    with pytest.raises(CorruptImageError, match="send"):
        read_photo(data[:cut])


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header_of(name: str, width: int, height: int) -> bytes:
    """A small file whose header claims a large picture."""
    if name == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(99)))
        return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")
    data = bytearray(
        encode(Image.new("RGB", (200, 100)), name, **({"lossless": True} if name == "WEBP" else {}))
    )
    if name == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif name == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif name == "WEBP":
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        raise ValueError(name)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "width", "height"),
    [
        ("PNG", 50_000, 50_000),
        ("PNG", 10_000, 9_000),
        ("JPEG", 65_500, 65_500),
        ("JPEG", 10_000, 10_000),
        ("BMP", 30_000, 30_000),
        ("WEBP", 16_383, 16_383),
        ("WEBP", 9_000, 9_000),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(name: str, width: int, height: int) -> None:
    with pytest.raises(ImageTooLargeError, match="64000000"):
        read_photo(header_of(name, width, height))


def test_a_picture_that_is_no_photo_by_its_shape_is_refused() -> None:
    for size in ((70_000, 1), (1, 70_000)):
        buffer = BytesIO()
        Image.new("1", size).save(buffer, "PNG")
        with pytest.raises(ImageTooLargeError, match="65535 a side"):
            read_photo(buffer.getvalue())


def test_the_pixel_limit_is_inclusive(photo: Image.Image) -> None:
    data = encode(photo, "PNG")
    read_photo(data, max_pixels=WIDTH * HEIGHT)
    with pytest.raises(ImageTooLargeError, match=f"{WIDTH}×{HEIGHT} = {WIDTH * HEIGHT} pixels"):
        read_photo(data, max_pixels=WIDTH * HEIGHT - 1)


def test_a_jpeg_of_thousands_of_scans_is_refused(photo: Image.Image) -> None:
    data = encode(photo, "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(CorruptImageError, match="scans"):
        read_photo(data[:-2] + last_scan * 3000 + data[-2:])


def test_data_after_a_jpeg_is_ignored(photo: Image.Image) -> None:
    data = encode(photo, "JPEG")
    film = np.random.default_rng(0).bytes(8 << 20)  # holds FF DA more than a hundred times
    assert film.count(b"\xff\xda") > 100
    assert np.array_equal(read_photo(data + film).pixels, read_photo(data).pixels)
    notes = data[:2] + b"\xff\xe4" + (60_002).to_bytes(2, "big") + b"\xff\xda" * 30_000 + data[2:]
    assert np.array_equal(read_photo(notes).pixels, read_photo(data).pixels)


@pytest.mark.filterwarnings("ignore")  # as in production: see the filter in photos.image
@pytest.mark.parametrize("name", [*FORMATS, "progressive", "palette", "grey16", "deflate", "MPO"])
def test_hostile_bytes_raise_nothing_but_image_errors(photo: Image.Image, name: str) -> None:
    small = photo.resize((80, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "progressive": lambda: encode(small, "JPEG", progressive=True, exif=exif),
        "palette": lambda: encode(small.quantize(16), "PNG", transparency=3, exif=exif),
        "grey16": lambda: encode(
            Image.fromarray(np.asarray(small.convert("L")) * np.uint16(257)), "TIFF"
        ),
        "deflate": lambda: encode(small, "TIFF", compression="tiff_deflate"),
        "MPO": lambda: encode(small, "MPO", save_all=True, append_images=[small]),
    }.get(name, lambda: encode(small, name, exif=exif))()
    rng = random.Random(name)
    outcomes: set[type] = set()
    messages: list[str] = []
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            # Headers are where the interesting damage is.
            at = rng.randrange(len(mutated) if rng.random() < 0.5 else min(len(mutated), 400))
            what = rng.random()
            if what < 0.6:
                mutated[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif what < 0.8:
                del mutated[at : at + rng.randint(1, 64)]
            elif what < 0.9:
                mutated[at:at] = rng.randbytes(rng.randint(1, 64))
            else:
                mutated[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4))
            if len(mutated) < 20:
                break
        try:
            read = read_photo(bytes(mutated), max_pixels=4_000_000)
        except ImageError as error:
            messages.append(str(error))
            outcomes.add(type(error))
        else:
            assert read.pixels.shape == (MODEL_SIZE, MODEL_SIZE, 3)
            outcomes.add(type(read))
    assert len(outcomes) > 1
    assert all("send" in message or "save" in message for message in messages)
    assert not any("0x" in message for message in messages)  # no addresses of objects


def test_threads_do_not_disturb_each_other(photo: Image.Image) -> None:
    files = [encode(photo.convert(mode), "PNG") for mode in ("RGB", "L", "RGBA", "1")]
    expected = [read_photo(data).pixels for data in files]
    wrong: list[int] = []

    def work(start: int) -> None:
        for turn in range(start, start + 20):
            index = turn % len(files)
            if not np.array_equal(read_photo(files[index]).pixels, expected[index]):
                wrong.append(index)
            with pytest.raises(ImageTooLargeError):
                read_photo(files[index], max_pixels=10)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def naive_probability(
    probability: NDArray[np.float32], width: int, height: int
) -> NDArray[np.float64]:
    """Bilinear up-sampling written out: half-pixel centres, edges clamped."""

    def positions(length: int, source: int) -> tuple[Any, Any, Any]:
        centre = (np.arange(length) + 0.5) * source / length - 0.5
        centre = np.clip(centre, 0, source - 1)
        before = np.floor(centre).astype(int)
        return before, np.minimum(before + 1, source - 1), centre - before

    values = probability.astype(np.float64)
    left, right, share = positions(width, values.shape[1])
    values = values[:, left] * (1 - share) + values[:, right] * share
    top, bottom, share = positions(height, values.shape[0])
    return np.asarray(values[top] * (1 - share[:, None]) + values[bottom] * share[:, None])


def blob() -> NDArray[np.float32]:
    rows, columns = np.mgrid[:MODEL_SIZE, :MODEL_SIZE]
    angle = np.arctan2(rows - 66, columns - 60)
    distance = np.hypot(rows - 66, columns - 60) - 40 - 6 * np.sin(7 * angle)
    return np.asarray(1 / (1 + np.exp(distance / 2)), np.float32)


SIZES = [(1, 1), (7, 5), (8, 8), (16, 3), (100, 75), (128, 128), (333, 1001), (1023, 767)]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["blob", "noise"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_mask_equals_naive_upsampling(width: int, height: int, kind: str, threshold: float) -> None:
    noise = np.random.default_rng(5).random((MODEL_SIZE, MODEL_SIZE), np.float32)
    probability = blob() if kind == "blob" else noise
    packed = lesion_mask(probability, width, height, threshold)
    assert packed.shape == (height, -(-width // 8))
    assert packed.dtype == np.uint8
    mask = unpack_mask(packed, width)
    assert mask.shape == (height, width)
    assert mask.dtype == np.bool_
    expected = naive_probability(probability, width, height)
    unlike = mask != (expected > threshold)
    # Only where the probability is the threshold to within float32's rounding may they differ.
    assert np.all(np.abs(expected[unlike] - threshold) < 1e-6)


def test_mask_matches_torch_interpolation() -> None:
    torch = pytest.importorskip("torch")
    probability = blob()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(probability)[None, None], (450, 600), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    mask = unpack_mask(lesion_mask(probability, 600, 450), 600)
    assert np.all(np.abs(expected[mask != (expected > 0.5)] - 0.5) < 1e-5)


@pytest.mark.parametrize(("value", "lesion"), [(0.0, False), (0.5, False), (0.50001, True)])
def test_a_flat_map_is_all_or_nothing(value: float, lesion: bool) -> None:
    flat = np.full((MODEL_SIZE, MODEL_SIZE), value, np.float32)
    packed = lesion_mask(flat, 13, 9)
    assert np.all(unpack_mask(packed, 13) == lesion)
    assert np.all(packed[:, -1] & 0b111 == 0)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_png_holds_the_mask(width: int, height: int) -> None:
    packed = lesion_mask(blob(), width, height)
    with Image.open(BytesIO(encode_png(packed, width, height)), formats=("PNG",)) as image:
        assert image.mode == "1"
        assert image.size == (width, height)
        assert np.array_equal(np.asarray(image), unpack_mask(packed, width))


def test_png_of_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="800×600"):
        encode_png(lesion_mask(blob(), 600, 450), 800, 600)


def test_mask_memory_stays_far_below_one_float_image() -> None:
    import tracemalloc

    width, height = 6000, 4000
    probability = blob()
    tracemalloc.start()
    packed = lesion_mask(probability, width, height)
    encode_png(packed, width, height)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < width * height  # bytes; a float32 image takes four times that
