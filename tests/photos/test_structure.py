"""What a few bytes can ask for is refused before it is done; unusual but sound files are read."""

import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from photos.image import CorruptImageError, ImageError, read_photo
from tests.support.attacks import attacks

ATTACKS = attacks()

# Of CPU; none takes a tenth of a second where it is refused by its structure.
MOST_S = 2.0


def photo(name: str, **options: object) -> bytes:
    buffer = BytesIO()
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(small).resize((600, 450), Image.Resampling.BICUBIC).save(
        buffer, name, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize("name", ATTACKS)
def test_no_file_takes_long(name: str) -> None:
    started = time.thread_time()
    with pytest.raises(ImageError, match=r"send|save"):
        read_photo(ATTACKS[name])
    assert time.thread_time() - started < MOST_S


@pytest.mark.parametrize(
    "between", [b"\xff\x01", b"\xff\xff\xff", b"\xff\x01\xff\xff", b"\xff\xd3"]
)
def test_markers_without_a_length_are_no_fault(between: bytes) -> None:
    data = photo("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    read = read_photo(data[:last] + between + data[last:])
    np.testing.assert_array_equal(read.pixels, read_photo(data).pixels)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"])
@pytest.mark.parametrize("big_tiff", [False, True])
def test_sound_tiffs_are_read(compression: str, big_tiff: bool) -> None:
    expected = read_photo(photo("PNG")).pixels.astype(int)
    data = photo(
        "TIFF",
        compression=compression,
        big_tiff=big_tiff,
        tiffinfo={278: 1 if compression != "jpeg" else 8},
    )
    assert abs(read_photo(data).pixels - expected).mean() < 3


def test_long_and_damaged_exif_is_no_fault_but_hostile_one_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 200_000
    read = read_photo(photo("PNG", exif=exif.tobytes()))
    assert (read.width, read.height) == (450, 600)
    assert (
        read_photo(photo("PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(200_000))).width
        == 600
    )
    with pytest.raises(CorruptImageError, match="EXIF"):
        read_photo(ATTACKS["WebP EXIF headers"])
