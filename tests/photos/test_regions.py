"""The largest region, held against SciPy's labelling."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from photos.image import lesion_mask, unpack_mask
from photos.masks import polygons
from photos.regions import largest_region


def _map(*rows: str) -> NDArray[np.float32]:
    """Rows of digits: tenths of probability."""
    return np.array([[int(digit) / 10 for digit in row] for row in rows], np.float32)


def test_only_the_largest_region_stays_and_what_is_below_the_threshold_is_as_it_was() -> None:
    probability = _map(
        "9900003",
        "9900088",
        "0000888",
        "7000880",
    )
    cleaned = largest_region(probability)
    assert np.array_equal(
        cleaned,
        _map(
            "0000003",
            "0000088",
            "0000888",
            "0000880",
        ),
    )
    assert probability[0, 0] == np.float32(0.9), "the caller's array stays"


def test_corners_do_not_join_regions() -> None:
    cleaned = largest_region(_map("990", "990", "009"))
    assert (cleaned > 0.5).sum() == 4


def test_holes_are_filled_and_bays_are_not() -> None:
    probability = _map(
        "99999",
        "92999",
        "99990",
        "93399",
        "93399",
    )
    cleaned = largest_region(probability) > 0.5
    assert cleaned[1, 1]
    assert not cleaned[2, 4]
    assert not cleaned[3:, 1:3].any()


def test_a_hole_that_holds_another_region_is_filled_whole() -> None:
    probability = _map("99999", "90009", "90909", "90009", "99999")
    assert (largest_region(probability) > 0.5).all()


def test_background_joined_to_the_frame_by_a_corner_alone_is_a_hole() -> None:
    probability = _map("0999", "9099", "9999", "9999")
    cleaned = largest_region(probability) > 0.5
    assert cleaned[1, 1]
    assert not cleaned[0, 0]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_empty_and_a_full_map_stay(value: float) -> None:
    probability = np.full((128, 128), value, np.float32)
    assert np.array_equal(largest_region(probability), probability)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_what_scipy_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(random.random((128, 128)), random.uniform(0.5, 6))
    probability = ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)
    threshold = float(random.uniform(0.3, 0.7))
    labels, count = ndimage.label(probability > threshold)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = largest_region(probability, threshold) > threshold
    # Of several that are equally large any will do.
    assert any(
        np.array_equal(
            found,
            ndimage.binary_fill_holes(labels == 1 + largest),
        )
        for largest in np.flatnonzero(sizes == sizes.max())
    )


@pytest.mark.parametrize("seed", range(5))
def test_up_sampled_it_is_one_part(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(random.random((128, 128)), 2)
    probability = ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)
    cleaned = largest_region(probability)
    mask = unpack_mask(lesion_mask(cleaned, 600, 450), 600)
    _, count = ndimage.label(mask, structure=np.ones((3, 3)))
    assert count == 1
    assert len(polygons(cleaned, 600, 450, 0.5)) == 1
