"""What a perfect detector, or perfect labels of superpixels, would give on drawn lesions."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.lesions import lesion_photo
from tests.support.tiny import write_pair

pytest.importorskip("cv2", reason="needs requirements-zoo.txt")
pytest.importorskip("skimage", reason="needs requirements-zoo.txt")

from model.zoo.ceilings import grabcut, main, superpixels


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_a_drawn_lesion_is_cut_out_of_its_box() -> None:
    photo = lesion_photo(1, 96, 96)
    found = grabcut(photo.pixels, photo.mask)
    rows, columns = np.flatnonzero(photo.mask.any(1)), np.flatnonzero(photo.mask.any(0))
    box = np.zeros_like(photo.mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    assert overlap(found, photo.mask) > overlap(box, photo.mask)


def test_where_there_is_no_box_or_no_background_nothing_is_cut() -> None:
    photo = lesion_photo(1, 32, 32)
    nothing = np.zeros_like(photo.mask)
    assert not grabcut(photo.pixels, nothing).any()
    assert grabcut(photo.pixels, ~nothing).all()


def test_more_superpixels_follow_the_border_better() -> None:
    photo = lesion_photo(2, 96, 96)
    few, many = (overlap(superpixels(photo.pixels, photo.mask, n), photo.mask) for n in (20, 600))
    assert few < many and many > 0.8


def test_the_command_prints_a_figure_for_each_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        write_pair(tmp_path, tmp_path, f"photo_{i}", i)
    main(["--images", str(tmp_path), "--masks", str(tmp_path), "--limit", "2", "--side", "64"])
    said = capsys.readouterr().out
    assert "mean Jaccard over 2 photos at 64×64" in said
    for name in ("GrabCut in the annotated box", "SLIC, 300 segments", "SLIC, 1000 segments"):
        assert name in said
    (tmp_path / "photo_0.jpg").write_bytes(b"no photo")
    with pytest.raises(SystemExit):
        main(["--images", str(tmp_path), "--masks", str(tmp_path)])
    assert "photo_0.jpg" in capsys.readouterr().err
