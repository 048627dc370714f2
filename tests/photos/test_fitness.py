"""How far pictures are from dermoscopic photos: features, and the detector that weighs them."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from photos.fitness import FEATURES, Detector, features, inside_frame, is_unfit

GROUPS = 2
TRIANGLE = FEATURES * (FEATURES + 1) // 2


def identity(scale: float) -> tuple[float, ...]:
    return tuple((scale * np.eye(FEATURES))[np.triu_indices(FEATURES)].tolist())


def made(means: list[NDArray[np.float64]], offsets: tuple[float, ...] = (0.0, 3.0)) -> Detector:
    rows = tuple(tuple(mean.tolist()) for mean in means)
    return Detector("ab" * 32, 100, 2.0, rows, (identity(1), identity(2)), offsets)


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), np.uint8)


DETECTOR = made([np.zeros(FEATURES), np.full(FEATURES, 1.0)])


def test_the_distance_is_that_from_the_nearest_group() -> None:
    at = features(picture(0))
    away = np.zeros(FEATURES)
    away[3] = 3.0
    assert made([at, at + 50]).distance(picture(0)) == 0
    # 3 from the first, of which 2 is the limit; what the second adds is counted before the root.
    assert made([at - away, at + 50]).distance(picture(0)) == pytest.approx(1.5, abs=1e-3)
    assert made([at + 50, at - away]).distance(picture(0)) == pytest.approx(
        np.sqrt(36 + 3) / 2, abs=1e-3
    )
    assert is_unfit(1.001) and not is_unfit(1.0)


def test_features_say_what_they_are_said_to() -> None:
    flat = features(np.full((128, 128, 3), (200, 100, 50), np.uint8))
    assert flat.shape == (FEATURES,) and np.isfinite(flat).all()
    # 1e-6 is the least; how processors add up in float32 leaves about as much.
    assert (flat[:13] < np.log(3e-6)).all(), "no detail at any scale"
    red, yellow, bright, dark = flat[-4:]
    assert (red, yellow, bright, dark) == (1, 1, 0, 0)
    black = features(np.zeros((128, 128, 3), np.uint8))
    assert np.isfinite(black).all() and black[-1] == 1 and black[-2] == 0
    # Squares of 8 pixels are detail at the scale of 8 against 16, and not at that of 2 against 4.
    y, x = np.mgrid[:128, :128] // 8
    squares = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    amount = features(squares)[1:13].reshape(4, 3)
    assert amount[2, 0] > np.log(0.2) and amount[0, 0] < np.log(1e-5)
    assert (amount[:, 1:] < np.log(2e-6)).all(), "grey has no colour"


def test_turning_a_picture_by_half_changes_nothing() -> None:
    whole = picture(1)
    for turned in (whole[::-1, ::-1], whole[:, ::-1]):
        np.testing.assert_allclose(features(turned.copy()), features(whole), atol=5e-3)


def smooth(seed: int) -> NDArray[np.uint8]:
    """A picture that interpolation changes little, and that is nowhere dark."""
    coarse = np.random.default_rng(seed).uniform(80, 200, (4, 4, 3))
    at = np.arange(128) // 32
    return coarse[at][:, at].astype(np.uint8)


@pytest.mark.parametrize("level", [0, 30])
def test_bars_are_no_part_of_a_picture(level: int) -> None:
    picture = smooth(2)
    framed = np.full_like(picture, level)
    framed[16:112, 8:104] = picture[16:112, 8:104]
    inside = inside_frame(framed)
    assert inside is not None and inside.shape == picture.shape and inside.dtype == np.uint8
    # Pixel by pixel this is the nearest one, of which a linear mean is half a pixel off at most.
    rows = 16 + (np.arange(128) * 96 + 48) // 128
    nearest = picture[rows][:, rows - 8]
    assert (inside == nearest).mean() > 0.9


def test_a_round_field_leaves_about_the_square_within() -> None:
    picture = smooth(3)
    y, x = np.mgrid[:128, :128] - 63.5
    picture[np.hypot(x, y) > 56] = 10
    inside = inside_frame(picture)
    assert inside is not None
    assert 0 < (inside.max(axis=2) < 50).mean() < 0.03, "the corners of a somewhat larger square"


def test_what_has_no_frame_stays_as_it_is() -> None:
    whole = smooth(4)
    assert inside_frame(whole) is None
    whole[40:90, 40:90] = 5
    assert inside_frame(whole) is None, "a dark lesion"
    whole[:3] = 0
    inside = inside_frame(whole)
    assert inside is not None and (inside < 50).any(), "and it stays where there is one"
    for level in (0, 255):
        assert inside_frame(np.full((128, 128, 3), level, np.uint8)) is None
    paper = np.full((128, 128, 3), 255, np.uint8)
    paper[20:-20, 20:-20] = smooth(4)[20:-20, 20:-20]
    assert inside_frame(paper) is None, "masks often reach up to a white border"
    small = np.zeros((128, 128, 3), np.uint8)
    small[40:90, 40:90] = smooth(4)[40:90, 40:90]
    assert inside_frame(small) is None, "what is left is less than half as wide"


def test_a_picture_is_as_near_as_what_is_inside_its_frame() -> None:
    framed = np.zeros((128, 128, 3), np.uint8)
    framed[10:-10] = smooth(5)[10:-10]
    inside = inside_frame(framed)
    assert inside is not None
    assert made([features(inside), features(inside) + 50]).distance(framed) == 0
    assert made([features(framed), features(inside) + 50]).distance(framed) == 0
    assert made([features(framed) + 50, features(inside) + 50]).distance(framed) > 1


def test_a_detector_is_what_was_written() -> None:
    assert Detector.parse(DETECTOR.document()) == DETECTOR


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 0},
        {"limit": float("nan")},
        {"limit": None},
        {"means": [[0.0] * FEATURES]},
        {"means": [[0.0] * FEATURES, [0.0] * (FEATURES - 1)]},
        {"means": [[0.0] * FEATURES, [float("inf")] * FEATURES]},
        {"whitening": [[0.0] * TRIANGLE, [0.0] * 3]},
        {"whitening": "abc"},
        {"offsets": [0.0]},
        {"offsets": []},
        {"offsets": [0.0, -1.0]},
        {"weights_sha256": ...},
    ],
)
def test_what_is_no_detector_is_refused(change: dict[str, object]) -> None:
    values = {**json.loads(DETECTOR.document()), **change}
    document = json.dumps({name: value for name, value in values.items() if value is not ...})
    with pytest.raises(ValueError, match=r"numbers|limit|holds no detector|convert"):
        Detector.parse(document.encode())
    for text in (b"", b"[]", b"\xff", b"3"):
        with pytest.raises(ValueError, match=r".+"):
            Detector.parse(text)


def test_the_shipped_one_says_what_it_said() -> None:
    """Of black and of one photo: features that change make it another detector."""
    path = Path(__file__).parents[2] / "model/weights/slsnet.fitness.json"
    detector = Detector.parse(path.read_bytes())
    assert detector.distance(np.zeros((128, 128, 3), np.uint8)) == pytest.approx(5.291, abs=0.01)
