"""AVIF and HEIC: read as other formats are, within the same limits, in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from photos import heif
from photos.image import (
    UPRIGHT,
    CorruptImageError,
    ImageError,
    ImageTooLargeError,
    NoDecoderError,
    read_photo,
)
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.phones import FORMATS, encode_phone, needs, phone_attacks, turned

PIXELS = lesion_photo(2, 320, 240).pixels


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


def test_it_looks_as_the_same_photo_in_another_format(name: str) -> None:
    found, same = read_photo(encode_phone(PIXELS, name)), read_photo(encode_photo(PIXELS, "PNG"))
    assert (found.width, found.height, found.orientation) == (320, 240, 1)
    assert found.pixels.shape == (128, 128, 3) and found.pixels.dtype == np.uint8
    assert np.abs(found.pixels.astype(int) - same.pixels).mean() < 2


@pytest.mark.parametrize("mirror", [None, 0, 1])
@pytest.mark.parametrize("turns", range(4))
def test_it_is_turned_as_its_header_says(name: str, turns: int, mirror: int | None) -> None:
    data = turned(encode_phone(PIXELS, name), turns, mirror)
    upright = np.rot90(PIXELS, turns)
    if mirror is not None:
        upright = upright[::-1] if mirror == 0 else upright[:, ::-1]
    found = read_photo(data)
    same = read_photo(encode_photo(np.ascontiguousarray(upright), "PNG"))
    assert (found.width, found.height) == upright.shape[1::-1]
    assert np.abs(found.pixels.astype(int) - same.pixels).mean() < 2
    # The number is EXIF's: it turns the stored picture the same way.
    exif = read_photo(
        encode_photo(np.ascontiguousarray(upright), "PNG", orientation=found.orientation)
    )
    assert found.orientation == exif.orientation
    stored = Image.fromarray(PIXELS)
    if found.orientation > 1:
        stored = stored.transpose(UPRIGHT[found.orientation])
    assert np.array_equal(np.asarray(stored), upright)


def test_grey_and_transparent_ones_are_read(name: str) -> None:
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"))
    found = read_photo(encode_phone(grey, name))
    assert np.ptp(found.pixels.astype(int), axis=2).max() <= 4
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert read_photo(encode_phone(clear, name)).pixels.min() >= 250


def test_a_film_is_its_first_frame() -> None:
    needs("AVIF")
    other = Image.fromarray(255 - PIXELS)
    data = encode_phone(PIXELS, "AVIF", save_all=True, append_images=[other])
    first = read_photo(encode_phone(PIXELS, "AVIF"))
    assert np.abs(read_photo(data).pixels.astype(int) - first.pixels).mean() < 4


def test_too_many_pixels_are_refused_before_anything_is_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode_phone(PIXELS, name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageTooLargeError, match=r"320×240 = 76800 pixels, 70000 are allowed"):
        read_photo(data, max_pixels=70_000)


def test_room_is_taken_while_it_is_decoded(name: str) -> None:
    asked: list[int] = []

    class Room:
        def __enter__(self) -> None:
            asked.append(0)

        def __exit__(self, *_: object) -> None:
            asked.append(-1)

    def room(pixels: int) -> Room:
        asked.append(pixels)
        return Room()

    read_photo(encode_phone(PIXELS, name), room=room)
    assert asked == [320 * 240, 0, -1]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_a_truncated_one_is_refused(name: str, share: float) -> None:
    data = encode_phone(PIXELS, name)
    with pytest.raises(CorruptImageError, match=f"{name} image"):
        read_photo(data[: int(share * len(data))])


def test_hostile_ones_are_refused(name: str) -> None:
    decoded = []
    for what, data in phone_attacks(name).items():
        try:
            read_photo(data)
        except ImageError:
            continue
        decoded.append(what)
    # libavif makes such a picture as small as its header says; what it takes for that is bounded.
    assert decoded in ([], ["a large picture behind a small header"])


@pytest.mark.parametrize(
    ("wanted", "code", "error"),
    [
        ("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", CorruptImageError),
        ("fails", "raise OSError", CorruptImageError),
        ("says too little", "print('no')", CorruptImageError),
        ("hangs", "while True: pass", CorruptImageError),
        ("grows", "x = [bytes(1 << 24) for _ in range(4000)]", ImageTooLargeError),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' limits")
def test_what_a_decoder_does_costs_its_photo_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, code: str, error: type[Exception]
) -> None:
    needs("AVIF")
    data = encode_phone(PIXELS, "AVIF")
    script = tmp_path / "decoder.py"
    # Private: the decoder cannot be made to misbehave in another way.
    source = heif._DECODER.read_text(encoding="utf-8")
    before = "        with opens"
    assert before in source
    script.write_text(source.replace(before, f"        {code}\n{before}"), encoding="utf-8")
    monkeypatch.setattr(heif, "_DECODER", script)
    # The others shall end in their own way, also on a slow machine.
    monkeypatch.setattr(heif, "_MAX_CPU_S", 1 if wanted == "hangs" else 60)
    with pytest.raises(error):
        read_photo(data)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heif, "find_spec", lambda _: None)
    heif.missing.cache_clear()
    yield
    heif.missing.cache_clear()


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("brands", "name", "way"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIC", "requirements-heif.txt.*JPEG or PNG.*Most Compatible"),
        (b"mif1\0\0\0\0mif1heic", "HEIC", "requirements-heif.txt"),
        (b"avif\0\0\0\0mif1avif", "AVIF", "Pillow.*JPEG or PNG"),
        (b"mif1\0\0\0\0mif1avif", "AVIF", "Pillow"),
    ],
)
def test_without_a_decoder_format_and_way_out_are_named(brands: bytes, name: str, way: str) -> None:
    with pytest.raises(NoDecoderError, match=f"{name}.*{way}"):
        read_photo(b"\0\0\0\x18ftyp" + brands + bytes(64))


def test_the_decoder_gets_neither_this_folder_nor_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PIL.py").write_text("raise SystemExit('loaded from the wrong place')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert read_photo(encode_phone(PIXELS, name)).width == 320
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109
