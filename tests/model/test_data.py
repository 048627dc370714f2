"""Finding, splitting, checking and caching of real folder layouts, in small."""

import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import model.data
from model.data import (
    Sample,
    find_pairs,
    find_samples,
    hold_out,
    load_pixels,
    read_mask,
    refuse_leakage,
    select,
)
from model.splits import split_samples
from model.truth import DataError
from photos.image import read_photo
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.tiny import tiny_config, write_isic2017, write_pair


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def splits(root: Path) -> set[tuple[str, str, str]]:
    return {(s.origin, s.split, s.id) for s in find_samples(root)}


def test_isic_2016(tmp_path: Path) -> None:
    for part, name in (("Training", "ISIC_0000000"), ("Test", "ISIC_0000003")):
        masks = tmp_path / f"ISBI2016_ISIC_Part1_{part}_GroundTruth"
        write_pair(tmp_path / f"ISBI2016_ISIC_Part1_{part}_Data", masks, name, 0)
        (masks / f"{name}_segmentation.png").rename(masks / f"{name}_Segmentation.png")
    assert splits(tmp_path) == {
        ("isic2016", "training", "ISIC_0000000"),
        ("isic2016", "test", "ISIC_0000003"),
    }


def test_isic_2017_with_its_superpixels_and_tables(tmp_path: Path) -> None:
    root = tmp_path / "isic2017"
    for i, part in enumerate(("Training", "Validation", "Test_v2")):
        images = root / f"ISIC-2017_{part}_Data"
        masks = root / f"ISIC-2017_{part}_Part1_GroundTruth"
        write_pair(images, masks, f"ISIC_000000{i}", i)
        Image.new("RGB", (40, 40)).save(images / f"ISIC_000000{i}_superpixels.png")
        (images / f"._ISIC_000000{i}.jpg").write_bytes(b"a Mac's notes")
        (images / f"ISIC-2017_{part}_Data_metadata.csv").write_text("image_id,age,sex\n")
    expected = {
        ("isic2017", "training", "ISIC_0000000"),
        ("isic2017", "validation", "ISIC_0000001"),
        ("isic2017", "test", "ISIC_0000002"),
    }
    assert splits(root) == splits(tmp_path) == expected  # the folder itself, or the one above it


def test_isic_2018(tmp_path: Path) -> None:
    for i, part in enumerate(("Training", "Validation", "Test")):
        images = tmp_path / f"ISIC2018_Task1-2_{part}_Input"
        write_pair(images, tmp_path / f"ISIC2018_Task1_{part}_GroundTruth", f"ISIC_000000{i}", i)
        (images / "LICENSE.txt").write_text("CC-0")
    assert splits(tmp_path) == {
        ("isic2018", "training", "ISIC_0000000"),
        ("isic2018", "validation", "ISIC_0000001"),
        ("isic2018", "test", "ISIC_0000002"),
    }


def test_ph2(tmp_path: Path) -> None:
    root = tmp_path / "PH2Dataset" / "PH2 Dataset images"
    for name in ("IMD002", "IMD003"):
        for folder, picture in (
            (f"{name}_Dermoscopic_Image", f"{name}.bmp"),
            (f"{name}_lesion", f"{name}_lesion.bmp"),
        ):
            (root / name / folder).mkdir(parents=True)
            Image.new("1" if "lesion" in picture else "RGB", (8, 8)).save(
                root / name / folder / picture
            )
    assert splits(tmp_path) == {("ph2", "test", "IMD002"), ("ph2", "test", "IMD003")}
    mask = root / "IMD003" / "IMD003_lesion" / "IMD003_lesion.bmp"
    mask.unlink()
    with pytest.raises(DataError, match=r"IMD003_lesion\.bmp is missing: unpack PH2 again"):
        find_samples(tmp_path)


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "masks"), ("images", "images"), (".", ".")]
)
def test_plain_pairs(tmp_path: Path, images: str, masks: str) -> None:
    write_pair(tmp_path / images, tmp_path / masks, "b", 0)
    photo = lesion_photo(1, 40, 40)
    (tmp_path / images / "a.PNG").write_bytes(encode_photo(photo.pixels, "PNG"))
    Image.fromarray(photo.mask).save(tmp_path / masks / "a_segmentation.png")
    samples = find_samples(tmp_path)
    assert ids(samples) == ["a", "b"]
    assert {(s.origin, s.split) for s in samples} == {("folder", "training")}


def test_missing_masks_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", tmp_path / "masks", "a", 0)
    for name in ("b", "c"):
        shutil.copy(tmp_path / "images/a.jpg", tmp_path / f"images/{name}.jpg")
    says = r"b\.jpg and 1 more have no mask: expected .*masks/b_segmentation\.png; add the mask"
    with pytest.raises(DataError, match=says):
        find_samples(tmp_path)


def test_folder_without_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no data set"):
        find_samples(tmp_path)
    (tmp_path / "ISIC-2017_Training_Data").mkdir()
    with pytest.raises(DataError, match="ISIC-2017_Training_Part1_GroundTruth is not a folder"):
        find_samples(tmp_path)
    (tmp_path / "ISIC-2017_Training_Part1_GroundTruth").mkdir()
    with pytest.raises(DataError, match="ISIC-2017_Training_Data holds no images"):
        find_samples(tmp_path)


def test_one_id_in_two_formats_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, tmp_path, "a", 0)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.bmp")
    with pytest.raises(DataError, match="holds a more than once"):
        find_pairs(tmp_path, tmp_path)


def sample(name: str, origin: str, split: str) -> Sample:
    return Sample(name, Path(f"{name}.jpg"), Path(origin) / f"{name}.png", origin, split)  # type: ignore[arg-type]


def test_the_newest_mask_is_taken_and_held_out_ids_stay_out() -> None:
    samples = [
        sample("1", "isic2018", "training"),
        sample("1", "isic2017", "training"),
        sample("1", "isic2016", "training"),
        sample("2", "isic2017", "training"),
        sample("3", "isic2017", "validation"),
        sample("3", "isic2018", "training"),
        sample("4", "isic2017", "test"),
        sample("4", "isic2018", "training"),
        sample("5", "isic2018", "training"),
    ]
    for order in (samples, samples[::-1]):
        training = select(order, "training")
        assert ids(training) == ["1", "2", "5"]
        assert training[0].origin == "isic2018"
        assert ids(select(order, "validation")) == ["3"]
        assert ids(select(order, "test")) == ["4"]


def test_leakage_names_the_id_and_both_splits() -> None:
    ours = [sample("7", "a", "training"), sample("8", "a", "training")]
    theirs = [sample("8", "b", "validation")]
    refuse_leakage({"training": ours, "validation": []})
    with pytest.raises(DataError, match="8 is in both training and validation: remove it"):
        refuse_leakage({"training": ours, "validation": theirs})


def test_folds_part_the_ids_and_stay() -> None:
    samples = [sample(f"ISIC_{i:07d}", "a", "training") for i in range(500)]
    held: list[str] = []
    for fold in range(5):
        kept, out = hold_out(samples, fold, 5)
        assert not set(ids(kept)) & set(ids(out)) and len(kept) + len(out) == 500
        assert 70 < len(out) < 130
        # an id's fold does not depend on which others there are
        assert ids(hold_out(samples[:250], fold, 5)[1]) == [
            name for name in ids(out) if name in set(ids(samples[:250]))
        ]
        held += ids(out)
    assert sorted(held) == ids(samples)


def test_pixels_are_the_images_squashed_to_a_square(tmp_path: Path) -> None:
    photo = lesion_photo(4, 96, 64)
    (tmp_path / "a.png").write_bytes(encode_photo(photo.pixels, "PNG"))
    Image.fromarray(photo.mask).save(tmp_path / "a_segmentation.png")
    pixels = load_pixels(find_pairs(tmp_path, tmp_path), 32)
    assert pixels.ids == ("a",)
    assert pixels.images.shape == (1, 3, 32, 32) and pixels.images.dtype == np.uint8
    assert pixels.masks.shape == (1, 1, 32, 32) and pixels.masks.dtype == np.uint8
    blocks = photo.pixels.reshape(32, 2, 32, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(pixels.images[0] - blocks).mean() < 8  # serving's filter is smoother
    share = photo.mask.reshape(32, 2, 32, 3).mean((1, 3)) * 255
    assert np.abs(pixels.masks[0, 0] - share).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_images_in_any_mode_are_accepted(tmp_path: Path, mode: str) -> None:
    photo = lesion_photo(2, 40, 40)
    suffix, kind = (".tif", "TIFF") if mode == "CMYK" else (".png", "PNG")
    (tmp_path / f"a{suffix}").write_bytes(encode_photo(photo.pixels, kind, mode=mode))
    Image.fromarray(photo.mask).save(tmp_path / "a_segmentation.png")
    image = load_pixels(find_pairs(tmp_path, tmp_path), 40).images[0].astype(int)
    if mode in ("L", "I;16"):
        assert (image == image[:1]).all()  # grey in all three channels
        assert np.abs(image[0] - photo.pixels @ [0.299, 0.587, 0.114]).mean() < 2
    else:
        assert np.abs(image - photo.pixels.transpose(2, 0, 1)).mean() < 6


def test_cache_is_used_and_rebuilt_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    for i in range(3):
        write_pair(folder, folder, f"p{i}", i)
    samples = find_pairs(folder, folder)
    decoded: list[int] = []

    def counting(data: bytes, *, size: int) -> object:
        decoded.append(len(data))
        return read_photo(data, size=size)

    monkeypatch.setattr(model.data, "read_photo", counting)
    first = load_pixels(samples, 32, cache)
    assert len(decoded) == 3
    again = load_pixels(samples, 32, cache)
    assert len(decoded) == 3
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.masks, first.masks)
    # another picture under the same name, another size, a damaged cache
    (folder / "p1.jpg").write_bytes(drawn_photo(9, 40, 40))
    changed = load_pixels(samples, 32, cache)
    assert len(decoded) == 6 and (changed.images[1] != first.images[1]).any()
    load_pixels(samples, 16, cache)
    assert len(decoded) == 9
    array = BytesIO()
    np.save(array, np.zeros(3))
    for damage in (lambda whole: whole[:100], lambda _: b"", lambda _: array.getvalue()):
        for entry in cache.iterdir():
            entry.write_bytes(damage(entry.read_bytes()))
        np.testing.assert_array_equal(load_pixels(samples, 32, cache).images, changed.images)
    assert len(decoded) == 18
    # a mask rewritten with the same size in bytes
    mask = folder / "p2_segmentation.png"
    stat = mask.stat()
    os.utime(mask, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_pixels(samples, 32, cache)
    assert len(decoded) == 21


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path, tmp_path, "a", 0)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.jpg cannot be used"):
        load_pixels(find_pairs(tmp_path, tmp_path), 32)
    (tmp_path / "a.jpg").write_text("a web page that says 404")
    with pytest.raises(DataError, match=r"a\.jpg cannot be used"):
        load_pixels(find_pairs(tmp_path, tmp_path), 32)


def png(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


BLACK = np.zeros((40, 40), np.uint8)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (png(BLACK[:30]), r"m\.png is 40×30, its image 40×40: resize the mask to its image"),
        (png(BLACK), r"m\.png is empty: redraw it, remove the pair, or set data\.allow_uniform"),
        (png(BLACK + 255), r"m\.png is all lesion: redraw it, .*data\.allow_uniform_masks=true"),
        (b"not a picture", r"m\.png does not decode as a mask .*: replace it"),
        (png(BLACK)[:50], r"m\.png does not decode as a mask"),
    ],
    ids=["size", "empty", "full", "text", "torn"],
)
def test_bad_masks_are_named(tmp_path: Path, mask: bytes, says: str) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(mask)
    with pytest.raises(DataError, match=says):
        read_mask(path, 32, (40, 40), allow_uniform=False)


def test_uniform_masks_can_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    for value in (0, 255):
        path.write_bytes(png(BLACK + np.uint8(value)))
        assert (read_mask(path, 32, (40, 40), allow_uniform=True) == value).all()


def test_small_official_release(tmp_path: Path) -> None:
    samples = find_samples(write_isic2017(tmp_path, 4, 2))
    assert len(select(samples, "training")) == 4 and len(select(samples, "validation")) == 2


def test_real_sets(data_dir: Path | None) -> None:
    if data_dir is None:
        pytest.skip("no real data here")
    samples = find_samples(data_dir)
    training, validation = select(samples, "training"), select(samples, "validation")
    refuse_leakage({"training": training, "validation": validation})
    both = {s.id for s in samples if s.origin == "isic2018"} & {
        s.id for s in samples if s.origin == "isic2017"
    }
    assert len(validation) == 149 and len(training) > 2000 and len(both) > 1000
    assert all(s.origin == "isic2018" for s in training if s.id in both)


def test_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    samples = find_samples(write_isic2017(tmp_path / "data", training=0, validation=2))
    with pytest.raises(DataError, match="there are no training photos beside those of validation"):
        split_samples(tiny_config(), samples, tmp_path / "cache")
