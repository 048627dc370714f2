"""Which file is a photo's mask, and what of it is lesion: the same for all that read masks."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.data import find_pairs, find_samples
from model.evaluate import main as evaluate_main
from model.truth import DataError, read_truth
from photos.image import read_photo
from tests.support.lesions import drawn_photo
from trt_build.samples import load_samples

MASK = np.zeros((30, 40), np.uint8)
MASK[10:20, 10:30] = 255


def photo_in(folder: Path, name: str = "a.jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(drawn_photo(1, 40, 30, "JPEG"))


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "a.PNG",
        "a.bmp",
        "a_segmentation.png",
        "a_segmentation.PNG",
        "a_segmentation.jpg",
        "a_Segmentation.tif",
        "a_lesion.png",
        "a_lesion.bmp",
        "a_mask.png",
    ],
)
@pytest.mark.parametrize("same_folder", [False, True])
def test_mask_names(tmp_path: Path, name: str, same_folder: bool) -> None:
    if same_folder and name.startswith("a."):
        pytest.skip("in one folder, two pictures of one name are two photos")
    images, masks = tmp_path / "images", tmp_path / ("images" if same_folder else "masks")
    masks.mkdir(parents=True)
    photo_in(images)
    Image.fromarray(MASK).save(masks / name)
    (pair,) = find_pairs(images, masks)
    assert (pair.id, pair.mask) == ("a", masks / name)
    assert find_samples(tmp_path) == [pair]
    (sample,) = load_samples(images, masks)
    assert sample.truth is not None
    assert np.array_equal(sample.truth, read_truth(masks / name))


def test_masks_below_the_photos_as_archives_have_them(tmp_path: Path) -> None:
    photo_in(tmp_path)
    (tmp_path / "masks").mkdir()
    Image.fromarray(MASK).save(tmp_path / "masks/a.png")
    assert [s.mask for s in find_samples(tmp_path)] == [tmp_path / "masks/a.png"]


def test_a_photo_may_be_named_like_a_mask(tmp_path: Path) -> None:
    photo_in(tmp_path / "images", "left_lesion.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(MASK).save(tmp_path / "masks/left_lesion.png")
    assert [s.id for s in find_pairs(tmp_path / "images", tmp_path / "masks")] == ["left_lesion"]


def test_two_masks_of_one_photo_are_refused(tmp_path: Path) -> None:
    photo_in(tmp_path)
    for name in ("a_segmentation.png", "a_lesion.png"):
        Image.fromarray(MASK).save(tmp_path / name)
    for find in (lambda: find_pairs(tmp_path, tmp_path), lambda: load_samples(tmp_path)):
        with pytest.raises(DataError, match="could both be the mask of"):
            find()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_refused_by_all_alike(tmp_path: Path, mode: str) -> None:
    photo_in(tmp_path)
    path = tmp_path / "a_segmentation.png"
    if mode in ("P", "L"):
        Image.fromarray(MASK).convert(mode).save(path, transparency=0)
    else:
        black = Image.new(mode, (40, 30))
        black.putalpha(Image.fromarray(MASK))
        black.save(path)
    readers: list[Callable[[], object]] = [
        lambda: read_truth(path),
        lambda: load_samples(tmp_path),
    ]
    for read in readers:
        with pytest.raises(DataError, match="is transparent in places"):
            read()
    with pytest.raises(SystemExit) as stopped:
        evaluate_main(["--images", str(tmp_path), "--masks", str(tmp_path)])
    assert stopped.value.code == 1


def test_opaque_alpha_channel_of_a_mask_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(MASK).convert("RGBA").save(path)
    assert np.array_equal(read_truth(path), MASK > 0)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4", "f4"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("kind", ["minisblack", "miniswhite", "planar"])
def test_a_tiff_is_read_rightly_or_refused(
    tmp_path: Path, dtype: str, order: Any, compression: str | None, kind: str
) -> None:
    path, white = tmp_path / "a.tif", 65535 if dtype == "u2" else 255
    mask = (MASK > 0) * np.dtype(dtype).type(white)
    options: dict[str, Any] = {"photometric": kind}
    if kind == "miniswhite":
        mask = white - mask
    elif kind == "planar":
        mask = np.stack([mask] * 3)
        options = {"photometric": "rgb", "planarconfig": "separate"}
    tifffile.imwrite(path, mask, byteorder=order, compression=compression, metadata=None, **options)
    read = None
    with contextlib.suppress(DataError):
        read = read_truth(path)
    if dtype == "u1" or (kind == "minisblack" and dtype == "i2" and compression is not None):
        assert read is not None
    assert read is None or np.array_equal(read, MASK > 0)


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_refused_tiff_is_told_why(tmp_path: Path, compression: str | None) -> None:
    path = tmp_path / "a.tif"
    inverted = 65535 - MASK.astype(np.uint16)
    tifffile.imwrite(path, inverted, photometric="miniswhite", compression=compression)
    with pytest.raises(DataError, match=r"a\.tif is stored in a way .* PNG of 8 bits"):
        read_truth(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_mask_is_turned_as_a_photo_is(
    tmp_path: Path, orientation: int, suffix: str, mode: str
) -> None:
    if mode == "1" and suffix == "webp":
        pytest.skip("WebP has no such mode")
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    corner = np.zeros((30, 40), np.uint8)
    corner[2:16, 4:20] = 255
    Image.fromarray(corner).convert(mode).save(path, exif=exif, **options)
    turned = read_truth(path)
    photo = read_photo(path.read_bytes(), size=20)
    assert turned.shape == (photo.height, photo.width)
    small = Image.fromarray(turned.astype(np.uint8) * 255).resize((20, 20), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, int) - photo.pixels[..., 0]).mean() < 10


def test_one_threshold(tmp_path: Path) -> None:
    photo_in(tmp_path)
    grey = MASK.copy()
    grey[15, 12:15] = (127, 128, 129)
    Image.fromarray(grey).save(tmp_path / "a_segmentation.png")
    (sample,) = load_samples(tmp_path)
    assert sample.truth is not None
    assert sample.truth[15, 12:15].tolist() == [False, False, True]
    assert np.array_equal(sample.truth, read_truth(tmp_path / "a_segmentation.png"))


def test_uniform_masks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        photo_in(tmp_path, f"{name}.jpg")
    Image.fromarray(MASK).save(tmp_path / "a_segmentation.png")
    Image.fromarray(MASK * 0).save(tmp_path / "b_segmentation.png")
    report = tmp_path / "out/report.json"
    evaluate_main(["--images", str(tmp_path), "--masks", str(tmp_path), "--report", str(report)])
    assert "masks that are empty or all lesion (1): b" in capsys.readouterr().err
    assert '"uniform_masks": [\n    "b"\n  ]' in report.read_text()
