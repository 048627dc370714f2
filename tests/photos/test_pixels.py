"""What is compiled gives the same bits as Pillow and numpy, which do it elsewhere."""

import importlib.util
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, _imaging

from photos import image, pixels
from photos.image import MODEL_SIZE, lesion_mask, read_photo
from tests.support import ROOT

NATIVE = ROOT / "photos/native"

runs_here = pytest.mark.skipif(
    pixels.library is None, reason="needs the compiled loops: pip install ./photos/native"
)


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)


def shapes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(3)
    sides = rng.integers(1, 900, (60, 2)).tolist()
    common = [(600, 450), (512, 384), (378, 252), (128, 128), (256, 256), (129, 127), (450, 600)]
    # So many in a mean that its weight is small, and that sums are wide.
    return [*common, (40_000, 3), (3000, 2000), *((width, height) for width, height in sides)]


def without_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pixels, "library", None)


@runs_here
@pytest.mark.parametrize("size", [MODEL_SIZE, 100, 7])
def test_the_square_is_pillows(size: int) -> None:
    compiled = 0
    for width, height in shapes():
        for values in (noise(width, height), np.full((height, width, 3), 255, np.uint8)):
            picture = Image.fromarray(values)
            square = pixels.squash(picture, size)
            if square is not None:
                compiled += 1
                expected = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
                np.testing.assert_array_equal(square, expected, f"{width}×{height}")
    assert compiled > len(shapes())


@runs_here
def test_common_photos_are_compiled_and_the_rest_is_left_to_pillow() -> None:
    for width, height in ((600, 450), (1024, 768), (450, 600), (576, 768)):
        assert pixels.squash(Image.new("RGB", (width, height)), MODEL_SIZE) is not None
    # Columns first; too large for one piece of memory.
    for width, height in ((300, 900), (6000, 4000)):
        assert pixels.squash(Image.new("RGB", (width, height)), MODEL_SIZE) is None


@runs_here
def test_lines_with_room_between_them_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.new("RGB", (601, 450))
    assert pixels.squash(picture, MODEL_SIZE) is not None
    monkeypatch.setattr(_imaging, "get_alignment", lambda: 64)
    assert pixels.squash(picture, MODEL_SIZE) is None


@runs_here
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
def test_the_mask_is_numpys(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:MODEL_SIZE, :MODEL_SIZE] - 60
    disc = (1 / (1 + np.exp((np.hypot(x, 1.2 * y) - 40) / 3))).astype(np.float32)
    steps = np.kron(rng.choice([0, 0.25, 0.5, 1], (16, 16)), np.ones((8, 8))).astype(np.float32)
    maps = [disc, steps, rng.random((128, 128), np.float32), rng.random((3, 1), np.float32)]
    maps.append(disc.T[::-1])  # not one piece of memory
    for width, height in [(1, 1), (9, 5), (6000, 50), *shapes()[:30]]:
        for probability in maps:
            compiled = lesion_mask(probability, width, height, threshold)
            with monkeypatch.context() as patch:
                without_library(patch)
                expected = lesion_mask(probability, width, height, threshold)
            np.testing.assert_array_equal(compiled, expected, f"{width}×{height}")


@runs_here
def test_scans_are_counted_alike_whatever_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    Image.fromarray(noise(90, 70)).save(buffer, "JPEG", progressive=True)
    photo = buffer.getvalue()
    rng = np.random.default_rng(11)
    # Marker bytes all over, lengths that are short, and ends in the middle of anything.
    markers = np.array([0, 1, 3, 0xD0, 0xD9, 0xDA, 0xDB, 0xFF, 0xFF, 0xFF], np.uint8)
    files = [photo, *(photo[:length] for length in range(3, len(photo), 97))]
    files += [
        b"\xff\xd8\xff" + rng.choice(markers, length - 3).tobytes()
        for length in [*range(3, 12), *rng.integers(12, 400, 300)]
    ]
    counts = [image.jpeg_scans(data) for data in files]
    without_library(monkeypatch)
    assert counts == [image.jpeg_scans(data) for data in files]
    assert counts[0] == 10
    assert max(counts[len(files) - 300 :]) > 1


def test_without_the_library_photos_and_masks_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = BytesIO()
    Image.fromarray(noise(600, 450)).save(buffer, "JPEG")
    read = read_photo(buffer.getvalue())
    without_library(monkeypatch)
    plain = read_photo(buffer.getvalue())
    assert plain.pixels.flags.writeable and read.pixels.flags.writeable
    np.testing.assert_array_equal(plain.pixels, read.pixels)


def test_missing_library_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As in a process of its own: tests before have said it in this one.
    spec = importlib.util.find_spec("photos.pixels")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(fresh, "library", None)
    monkeypatch.setattr(image, "pixels", fresh)
    for _ in range(3):
        lesion_mask(np.ones((4, 4), np.float32), 9, 5)
        assert image.jpeg_scans(b"\xff\xd8\xff\xda") == 1
    assert ["pip install ./photos/native" in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("found", ["none", "another system's", "another version"])
def test_a_command_without_the_library_gives_the_same_masks_and_says_so(
    found: str, tmp_path: Path
) -> None:
    package = tmp_path / "first/slsnet_pixels"
    package.mkdir(parents=True)
    (package / "pixels.so").write_bytes(b"\x7fELF")
    here = NATIVE / "slsnet_pixels/__init__.py"
    texts = {"none": "raise ModuleNotFoundError", "another system's": here.read_text()}
    (package / "__init__.py").write_text(texts.get(found, ""))
    run = "import sys; from server.command import main; sys.exit(main())"
    masks = []
    for name, path in (("with", str(ROOT)), ("without", f"{tmp_path}/first{os.pathsep}{ROOT}")):
        command = [sys.executable, "-c", run, "segment", str(ROOT / "docs/lesion.jpg")]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / name)],
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        if name == "without":
            assert done.stderr.count("pip install ./photos/native") == 1
        masks.append((tmp_path / name / "lesion_mask.png").read_bytes())
    assert masks[0] == masks[1]
