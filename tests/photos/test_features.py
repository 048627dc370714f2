"""Shape and colours of lesions: against known shapes, and against scikit-image."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from photos.features import COLOURS, Features, features
from photos.image import lesion_mask, unpack_mask
from photos.masks import polygons
from tests.support.probabilities import ellipse

WIDTH, HEIGHT = 800, 600
GREY = np.full((128, 128, 3), 128, np.uint8)


def measured(
    probability: NDArray[np.float32], pixels: NDArray[np.uint8] = GREY
) -> tuple[Features, NDArray[np.bool_]]:
    mask = unpack_mask(lesion_mask(probability, WIDTH, HEIGHT), WIDTH)
    found = features(
        *(probability, WIDTH, HEIGHT, 0.5),
        area=int(mask.sum()),
        outlines=polygons(probability, WIDTH, HEIGHT, 0.5),
        pixels=pixels,
    )
    assert found is not None
    return found, mask


@pytest.mark.parametrize("degrees", [0, 30, 90, -50])
def test_an_ellipse_is_what_it_was_drawn_as(degrees: float) -> None:
    found, _ = measured(ellipse(WIDTH, HEIGHT, 400, 220, degrees))
    assert found.major_axis == pytest.approx(400, rel=0.01)
    assert found.minor_axis == pytest.approx(220, rel=0.01)
    turned = abs(found.orientation - degrees) % 180
    assert min(turned, 180 - turned) < 1
    assert -90 < found.orientation <= 90
    assert found.eccentricity == pytest.approx(math.sqrt(1 - (220 / 400) ** 2), abs=0.01)
    # Ramanujan's formula for its perimeter.
    a, b = 200, 110
    around = math.pi * (3 * (a + b) - math.sqrt((3 * a + b) * (a + 3 * b)))
    assert found.perimeter == pytest.approx(around, rel=0.01)
    assert max(found.asymmetry_major, found.asymmetry_minor) < 0.02
    assert found.irregularity == pytest.approx(1, abs=0.05)
    assert found.compactness == pytest.approx(around**2 / (4 * math.pi**2 * a * b), rel=0.02)
    assert found.solidity > 0.99


def test_half_a_disc_is_symmetric_about_one_axis() -> None:
    disc = ellipse(WIDTH, HEIGHT, 400, 400, 0)
    disc[: len(disc) // 2] = 0
    found, mask = measured(disc)
    assert abs(found.orientation) < 1
    assert found.asymmetry_minor < 0.02
    # Folded over the line through its centroid, 4r/3π above the diameter.
    rows = np.nonzero(mask.any(axis=1))[0]
    centre = (np.nonzero(mask)[0] + 0.5).mean()
    mirrored = np.zeros_like(mask)
    for row in rows:
        other = int(2 * centre - row - 0.5)
        mirrored[other] = mask[row]
    assert found.asymmetry_major == pytest.approx((mask & ~mirrored).sum() / mask.sum(), abs=0.02)
    assert found.asymmetry_major > 0.1


def test_notches_are_irregular_and_not_solid() -> None:
    whole, _ = measured(ellipse(WIDTH, HEIGHT, 400, 400, 0))
    notched = ellipse(WIDTH, HEIGHT, 400, 400, 0)
    notched[:64, 60:66] = 0
    notched[64:, 50:54] = 0
    found, _ = measured(notched)
    assert found.irregularity > whole.irregularity + 0.5
    assert found.solidity < whole.solidity - 0.03


def test_colours_are_shared_out_to_the_nearest() -> None:
    pixels = np.zeros((128, 128, 3), np.uint8)
    names = list(COLOURS)
    for index, name in enumerate(names):
        pixels[:, index::6] = COLOURS[name]
    found, _ = measured(np.ones((128, 128), np.float32), pixels)
    columns = np.bincount(np.arange(128) % 6) / 128
    assert found.colours == pytest.approx(dict(zip(names, columns, strict=True)))
    assert found.colour_mean == pytest.approx(tuple(pixels.reshape(-1, 3).mean(axis=0)))
    assert found.colour_deviation == pytest.approx(tuple(pixels.reshape(-1, 3).std(axis=0)))


def test_only_what_is_inside_has_a_colour() -> None:
    probability = np.zeros((128, 128), np.float32)
    probability[30:90, 30:90] = 1
    pixels = np.full((128, 128, 3), 255, np.uint8)
    pixels[30:90, 30:90] = COLOURS["dark_brown"]
    found, _ = measured(probability, pixels)
    assert found.colours["dark_brown"] == 1
    assert found.colour_deviation == (0, 0, 0)


@pytest.mark.parametrize("area", [0, 1])
def test_nothing_has_no_features(area: int) -> None:
    nothing = np.zeros((128, 128), np.float32)
    given: dict[str, Any] = {"area": area, "outlines": [], "pixels": GREY}
    assert features(nothing, WIDTH, HEIGHT, 0.5, **given) is None


@pytest.mark.parametrize("shape", [(3, 2), (2, 500), (65_000, 3)])
def test_a_photo_of_any_shape_has_finite_features(shape: tuple[int, int]) -> None:
    width, height = shape
    probability = np.ones((128, 128), np.float32)
    found = features(
        *(probability, width, height, 0.5),
        area=width * height,
        outlines=polygons(probability, width, height, 0.5),
        pixels=GREY,
    )
    assert found is not None
    for value in vars(found).values():
        assert np.isfinite(list(value.values()) if isinstance(value, dict) else value).all()


@pytest.mark.parametrize("seed", range(4))
def test_scikit_image_measures_the_same(seed: int) -> None:
    measure = pytest.importorskip("skimage.measure", reason="needs scikit-image")
    rng = np.random.default_rng(seed)
    long, short = sorted(rng.uniform(120, 420, 2), reverse=True)
    probability = ellipse(WIDTH, HEIGHT, long, short, rng.uniform(-90, 90))
    probability *= rng.uniform(0.7, 1, (8, 8)).astype(np.float32).repeat(16, 0).repeat(16, 1)
    found, mask = measured(probability)
    (region,) = measure.regionprops(mask.astype(np.uint8))
    assert found.major_axis == pytest.approx(region.axis_major_length, rel=0.01)
    assert found.minor_axis == pytest.approx(region.axis_minor_length, rel=0.01)
    assert found.eccentricity == pytest.approx(region.eccentricity, abs=0.01)
    # Its angle is from the rows' axis, the other way.
    turned = abs(found.orientation - (90 - math.degrees(region.orientation))) % 180
    assert min(turned, 180 - turned) < 1
    assert found.solidity == pytest.approx(region.solidity, abs=0.01)
    assert found.perimeter == pytest.approx(region.perimeter_crofton, rel=0.03)
