"""The detector of other pictures: fitted to photos, tried on others, and the shipped one holds."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model import fitness
from model.evaluate import WEIGHTS, load_network
from model.fitness import FOLDS, fit, main, report, small
from model.others import KINDS, drawn, of_packages
from model.truth import DataError
from model.variations import FRAMES
from photos.fitness import FEATURES, Detector, features, is_unfit
from photos.image import read_photo
from tests.support.lesions import lesion_photo, write_pairs

SHIPPED = WEIGHTS.with_suffix(".fitness.json")


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.parse(SHIPPED.read_bytes())


@pytest.fixture(scope="module")
def photos() -> list[NDArray[np.uint8]]:
    return [small(lesion_photo(seed, 128, 128).pixels) for seed in range(150)]


def test_a_detector_lets_photos_like_its_own_pass_and_finds_others(
    photos: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: as many photos as a real detector needs would take minutes to draw.
    monkeypatch.setattr(fitness, "_LEAST_PHOTOS", 100)
    monkeypatch.setattr(fitness, "GROUPS", 2)
    found = np.array([features(photo) for photo in photos[:120]])
    made = fit(found, np.arange(len(found)) % FOLDS, "ab" * 32)
    assert made.photos == 120 and made.weights_sha256 == "ab" * 32
    assert Detector.parse(made.document()) == made
    assert np.mean([is_unfit(made.distance(photo)) for photo in photos[120:]]) < 0.1
    others = [small(drawn(kind, 0)) for kind in KINDS]
    assert np.mean([is_unfit(made.distance(other)) for other in others]) > 0.7


def test_too_few_photos_make_none() -> None:
    found = np.random.default_rng(0).normal(size=(60, FEATURES))
    with pytest.raises(DataError, match="60 photos are too few"):
        fit(found, np.arange(60) % FOLDS, "")


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pictures_follow_from_their_seed(kind: str) -> None:
    one, same, other = drawn(kind, 1), drawn(kind, 1), drawn(kind, 2)
    assert one.shape == (256, 256, 3) and one.dtype == np.uint8
    assert (one == same).all() and (one != other).any()


def test_a_report_counts_both_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: two of a kind are enough to be counted.
    monkeypatch.setattr(fitness, "_DRAWN_EACH", 2)
    monkeypatch.setattr(fitness, "_TURNS", 2)
    write_pairs(tmp_path / "photos", 3, 64, 64)
    write_pairs(tmp_path / "more", 2, 64, 64)
    main(["report", "--images", str(tmp_path / "photos"), "--others", str(tmp_path / "more")])
    said = capsys.readouterr().out
    assert "| photos, in a black border | " in said
    assert "| 3 |" in said and "| document, drawn | 2 | 2 | 100% |" in said
    assert "| more |" in said and "| **all** |" in said and "% of the network's" in said
    with pytest.raises(SystemExit) as ended:
        main(["report", "--images", str(tmp_path), "--detector", str(tmp_path / "none.json")])
    assert ended.value.code == 1 and "none.json" in capsys.readouterr().err


def test_the_shipped_detector_belongs_to_the_shipped_weights(detector: Detector) -> None:
    weights = WEIGHTS.with_suffix(".safetensors").read_bytes()
    assert detector.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert detector.weights_sha256 == load_network(WEIGHTS).metadata["weights_sha256"]


def test_the_shipped_detector_finds_other_pictures(detector: Detector) -> None:
    others = [small(drawn(kind, seed)) for kind in KINDS for seed in range(1000, 1010)]
    assert np.mean([is_unfit(detector.distance(other)) for other in others]) >= 0.95
    shipped = [pixels for _, pixels in of_packages()]
    assert not shipped or np.mean([is_unfit(detector.distance(p)) for p in shipped]) >= 0.85


def test_the_shipped_detector_looks_inside_frames(
    detector: Detector, photos: list[NDArray[np.uint8]]
) -> None:
    usual = [photo for photo in photos[:40] if not is_unfit(detector.distance(photo))][:10]
    assert len(usual) == 10
    framed = [detector.distance(frame(photo)) for frame in FRAMES.values() for photo in usual]
    assert np.mean([is_unfit(distance) for distance in framed]) <= 0.2


def test_the_shipped_detector_knows_photos_that_it_was_not_fitted_to(
    detector: Detector, data_dir: Path | None
) -> None:
    folder = data_dir and data_dir / "isic2017/ISIC-2017_Validation_Data"
    if not folder or not folder.is_dir():
        pytest.skip("needs the ISIC 2017 validation set (SLSNET_DATA)")
    paths = sorted(folder.glob("*.jpg"))
    photos = {"validation": (read_photo(path.read_bytes()).pixels for path in paths)}
    plain, *framed = (
        tuple(int(part) for part in line.split("|")[2:4])
        for line in report(detector, photos, []).splitlines()[2 : 3 + len(FRAMES)]
    )
    assert plain[1] == len(paths) and plain[0] <= 0.01 * plain[1]
    # Without a look inside, half of them or more are warned of.
    assert len(framed) == len(FRAMES)
    assert all(warned <= 0.05 * count for warned, count in framed)
