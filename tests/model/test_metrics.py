"""The figures against cases worked out by hand, and against the official scorer."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.metrics import (
    METRICS,
    Calibration,
    count,
    count_packed,
    jaccard,
    macro_average,
    stack,
)

Mask = NDArray[np.bool_]


def masks(seed: int, height: int, width: int) -> tuple[Mask, Mask]:
    """A truth and a prediction that overlap more or less; now and then one is empty or full."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]

    def blob() -> Mask:
        match rng.integers(6):
            case 0:
                return np.zeros((height, width), np.bool_)
            case 1:
                return np.ones((height, width), np.bool_)
        y, x = rng.uniform(0.35, 0.65, 2) * (height, width)
        radius = rng.uniform(0.2, 0.4) * min(height, width)
        return np.asarray(np.hypot(rows - y, columns - x) < radius)

    truth = blob()
    return truth, truth.copy() if rng.random() < 0.15 else blob()


# isic-challenge-scoring 5.6.0 on `masks` of the seeds 0 to 59, for where it cannot be installed.
OFFICIAL = {
    "accuracy": 0.7593862701698367,
    "dice": 0.4254229711666116,
    "jaccard": 0.3439372205745596,
    "sensitivity": 0.7261916546646995,
    "specificity": 0.7901591983885444,
    "threshold_jaccard": 0.1885714585289212,
}

EMPTY = np.zeros((4, 5), np.bool_)
FULL = np.ones((4, 5), np.bool_)
LEFT = np.arange(5) < np.full((4, 1), 2)  # 8 pixels
WIDER = np.arange(5) < np.full((4, 1), 3)  # 12 pixels


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        # accuracy, dice, jaccard, sensitivity, specificity, threshold Jaccard
        (LEFT, WIDER, (16 / 20, 16 / 20, 8 / 12, 1, 8 / 12, 8 / 12)),
        (WIDER, LEFT, (16 / 20, 16 / 20, 8 / 12, 8 / 12, 1, 8 / 12)),
        (FULL, WIDER, (12 / 20, 24 / 32, 12 / 20, 12 / 20, 1, 0)),
        (EMPTY, EMPTY, (1, 1, 1, 1, 1, 1)),
        (EMPTY, LEFT, (12 / 20, 0, 0, 1, 12 / 20, 0)),
        (LEFT, EMPTY, (12 / 20, 0, 0, 0, 1, 0)),
        (FULL, FULL, (1, 1, 1, 1, 1, 1)),
        (FULL, EMPTY, (0, 0, 0, 0, 1, 0)),
        (EMPTY, FULL, (0, 0, 0, 1, 0, 0)),
    ],
)
def test_cases_by_hand(truth: Mask, prediction: Mask, expected: tuple[float, ...]) -> None:
    figures = macro_average(stack([count(prediction, truth)]))
    names = ("accuracy", "dice", "jaccard", "sensitivity", "specificity", "threshold_jaccard")
    assert figures == pytest.approx(dict(zip(names, expected, strict=True)))


def test_the_mean_is_over_images_whatever_their_size() -> None:
    large = np.zeros((100, 100), np.bool_)
    large[:50] = True
    confusion = stack([count(large, large), count(EMPTY, LEFT)])
    assert macro_average(confusion)["jaccard"] == 0.5


def test_a_batch_counts_like_its_images() -> None:
    pairs = [masks(seed, 9, 13) for seed in range(8)]
    batch = count(np.stack([p for _, p in pairs]), np.stack([t for t, _ in pairs]))
    single = stack([count(p, t) for t, p in pairs])
    for name in ("tp", "fp", "fn", "tn"):
        assert np.array_equal(getattr(batch, name), getattr(single, name))


@pytest.mark.parametrize("width", [1, 8, 13])
def test_packed_masks_count_like_plain_ones(width: int) -> None:
    for seed in range(10):
        truth, prediction = masks(seed, 9, width)
        packed = count_packed(
            np.packbits(prediction, axis=1), np.packbits(truth, axis=1), truth.size
        )
        assert packed == count(prediction, truth)


def test_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="up-sample"):
        count(EMPTY, np.zeros((5, 4), np.bool_))


def test_agreement_with_what_the_official_scorer_said() -> None:
    pairs = [masks(index, 30 + index, 71 - index) for index in range(60)]
    own = macro_average(stack([count(prediction, truth) for truth, prediction in pairs]))
    assert own == pytest.approx(OFFICIAL, abs=1e-9)


@pytest.mark.filterwarnings("ignore")  # not this project's
def test_agreement_with_the_official_scorer(tmp_path: Path) -> None:
    segmentation = pytest.importorskip(
        "isic_challenge_scoring.segmentation", reason="needs requirements-scorer.txt"
    )
    truths, predictions = tmp_path / "truth", tmp_path / "prediction"
    truths.mkdir()
    predictions.mkdir()
    counts = []
    for index in range(60):
        truth, prediction = masks(index, 30 + index, 71 - index)
        Image.fromarray(truth).save(truths / f"ISIC_{index:07d}_segmentation.png")
        grey = Image.fromarray(prediction).convert("L")
        grey.save(predictions / f"ISIC_{index:07d}_segmentation.png")
        counts.append(count(prediction, truth))
    official = segmentation.SegmentationScore.from_dir(truths, predictions).macro_average
    own = macro_average(stack(counts))
    assert set(official.index) == set(METRICS)
    assert own == pytest.approx(official.to_dict(), abs=1e-9)
    assert official.to_dict() == pytest.approx(OFFICIAL, abs=1e-9)
    assert 0.1 < own["jaccard"] < 0.9  # the cases say something
    edges = {(t.any(), t.all(), p.any()) for t, p in (masks(i, 30 + i, 71 - i) for i in range(60))}
    assert len(edges) >= 5


def test_threshold_jaccard_counts_the_threshold_itself() -> None:
    truth, prediction = np.zeros((10, 10), np.bool_), np.zeros((10, 10), np.bool_)
    truth.flat[:100] = True
    prediction.flat[:65] = True
    confusion = count(prediction, truth)
    assert jaccard(confusion) == 0.65
    assert METRICS["threshold_jaccard"](confusion) == 0.65


def test_calibrated_probabilities_have_no_error() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    for _ in range(20):
        probability = rng.random((100, 100), np.float32)
        calibration.add(probability, rng.random((100, 100), np.float32) < probability)
    assert calibration.error() < 0.01
    confidence, lesion, share = calibration.curve()
    assert confidence == pytest.approx(lesion, abs=0.03)
    assert share == pytest.approx(np.full(15, 1 / 15), abs=0.01)


def test_calibration_error_by_hand() -> None:
    calibration = Calibration(bins=10)
    probability = np.array([[0.95, 0.95, 0.05, 0.05]], np.float32)
    calibration.add(probability, np.array([[True, False, False, False]]))
    # Half the pixels claim 0.95 and are 0.5, half claim 0.05 and are 0.
    assert calibration.error() == pytest.approx(0.5 * 0.45 + 0.5 * 0.05, abs=1e-6)


def test_calibration_takes_shares_of_lesion_and_the_ends() -> None:
    calibration = Calibration()
    ends = np.array([[0.0, 1.0]], np.float32)
    calibration.add(ends, ends)
    assert calibration.error() == 0


def test_an_image_weighs_the_same_whatever_its_size() -> None:
    calibration = Calibration()
    calibration.add(np.ones((2, 2), np.float32), np.zeros((2, 2), np.bool_))
    calibration.add(np.ones((200, 200), np.float32), np.ones((200, 200), np.bool_))
    assert calibration.error() == pytest.approx(0.5)


def test_no_images_have_no_calibration() -> None:
    assert np.isnan(Calibration().error())
