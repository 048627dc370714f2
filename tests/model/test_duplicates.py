"""Photos that belong together are held out together, and never both learnt from and judged by."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from model.config import DataConfig, TrainConfig
from model.data import Sample, find_samples
from model.splits import split_samples
from model.truth import DataError
from tests.support.lesions import lesion_photo
from tests.support.tiny import tiny_config, write_isic2017, write_pair

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same": lambda picture: picture,
    "larger": lambda picture: picture.resize((311, 203)),
    "turned": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned and mirrored": lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
    "darker": lambda picture: picture.point([value * 4 // 5 for value in range(256)] * 3),
}


def write(folder: Path, name: str, seed: int, change: str = "same", quality: int = 95) -> None:
    photo = lesion_photo(seed, 160, 120)
    picture = CHANGES[change](Image.fromarray(photo.pixels))
    picture.save(folder / f"{name}.jpg", quality=quality)
    mask = Image.fromarray(photo.mask)
    (mask if change == "darker" else CHANGES[change](mask)).save(
        folder / f"{name}_segmentation.png"
    )


def five_folds(folder: Path, groups: str | None = None) -> list[tuple[list[Sample], list[Sample]]]:
    found = []
    for fold in range(5):
        config = tiny_with(DataConfig(folds=5, fold=fold, groups=groups))
        kept, selections = split_samples(config, find_samples(folder), folder / "cache")
        found.append((kept, selections["holdout"]))
    return found


def tiny_with(data: DataConfig) -> TrainConfig:
    return dataclasses.replace(tiny_config(), data=data)


@pytest.mark.parametrize("change", CHANGES)
def test_seventeen_photos_under_two_ids_do_not_leak(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(17):
        write(tmp_path, f"{index:02d}", index)
        write(tmp_path, f"{index:02d}b", index, change, quality=80)
    held: list[str] = []
    for kept, out in five_folds(tmp_path):
        lesions = [{s.id.rstrip("b") for s in part} for part in (kept, out)]
        assert not lesions[0] & lesions[1]
        assert len(kept) + len(out) == 34
        held += lesions[1]
    # neither were different lesions taken for one
    assert sorted(held) == [f"{index:02d}" for index in range(17)]
    says = "in one fold, copies of other training photos (17): 00b = 00, "
    assert says in capsys.readouterr().err


def test_different_photos_are_not_taken_for_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(60):
        write(tmp_path, f"{index:02d}", index)
    five_folds(tmp_path)
    assert "copies" not in capsys.readouterr().err


def test_real_photos_of_different_lesions_are_not_taken_for_copies(
    tmp_path: Path, data_dir: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if data_dir is None or not (data_dir / "native").is_dir():
        pytest.skip("no real photos here")
    config = tiny_with(DataConfig(folds=5))
    split_samples(config, find_samples(data_dir / "native"), tmp_path)
    assert "copies" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["Validation", "Test_v2"])
def test_copies_of_held_out_photos_are_not_learnt_from(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_isic2017(tmp_path)
    held = root / f"ISIC-2017_{part}_Data"
    truth = root / f"ISIC-2017_{part}_Part1_GroundTruth"
    write_pair(held, truth, "ISIC_0000900", 900)
    with Image.open(held / "ISIC_0000900.jpg") as photo:
        mirrored = photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        mirrored.save(root / "ISIC-2017_Training_Data/ISIC_0000901.png")
    with Image.open(truth / "ISIC_0000900_segmentation.png") as mask:
        mirrored = mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        mirrored.save(root / "ISIC-2017_Training_Part1_GroundTruth/ISIC_0000901_segmentation.png")
    training, _ = split_samples(tiny_config(), find_samples(root), tmp_path / "cache")
    assert [s.id for s in training] == [f"ISIC_{i:07d}" for i in range(10)]
    assert (
        "left out of training, copies of validation or test photos (1): "
        "ISIC_0000901 = ISIC_0000900\n" in capsys.readouterr().err
    )


def test_photos_of_one_lesion_are_held_out_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(26):
        write(tmp_path, f"p{index:02d}", index)
    # as HAM10000's table: the id is not in the first column
    table = tmp_path / "table.csv"
    rows = [f"lesion{index // 3},p{index:02d}.jpg,nevus" for index in range(24)]
    table.write_text("\n".join(["lesion_id,image_id,diagnosis", *rows, ",p24,nevus"]))
    for kept, out in five_folds(tmp_path, groups=str(table)):
        lesions = [{int(s.id[1:]) // 3 for s in part if int(s.id[1:]) < 24} for part in (kept, out)]
        assert not lesions[0] & lesions[1] and len(lesions[0] | lesions[1]) == 8
    assert "2 of 26 photos have no lesion_id" in capsys.readouterr().err


def test_training_photos_of_a_validation_patient_are_left_out(tmp_path: Path) -> None:
    root = write_isic2017(tmp_path)
    table = tmp_path / "table.csv"
    table.write_text("isic_id,patient_id\nISIC_0000004,A\nISIC_0000500,A\nISIC_0000005,B\n")
    config = tiny_with(DataConfig(groups=str(table), group_column="patient_id"))
    training, _ = split_samples(config, find_samples(root), tmp_path / "cache")
    assert [s.id for s in training] == [f"ISIC_{i:07d}" for i in range(10) if i != 4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not a readable CSV file"),
        ("", r"has no column of ids \(isic_id, .*; there are: none"),
        ("photo,lesion_id\na,1\n", r"has no column of ids \(isic_id, .*; there are: photo"),
        ("image,lesion\na,1\n", r"has no column 'lesion_id' \(data.group_column\); there are: "),
        ("image,lesion_id\na,1\n", "holds none of the ids of the data"),
        ("image,lesion_id\n0,1\n0,2\n", "has 0 in 1 and in 2"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    write(tmp_path, "0", 0)
    table = tmp_path / "table.csv"
    if text is not None:
        table.write_text(text)
    config = tiny_with(DataConfig(folds=2, groups=str(table)))
    with pytest.raises(DataError, match=says):
        split_samples(config, find_samples(tmp_path), tmp_path / "cache")
