"""`clean` leaves one region at any threshold and size, and outlines enclose something."""

import json

import numpy as np
import pytest
from scipy import ndimage

from photos.image import lesion_mask, unpack_mask
from photos.masks import polygons
from photos.regions import largest_part, largest_region
from tests.support.probabilities import faint

THRESHOLDS = (0.0, 0.001, 0.01, 0.05, 0.5, 0.95)


@pytest.mark.parametrize("size", [(128, 128), (640, 480), (301, 777), (90, 61)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_one_region_without_holes(size: tuple[int, int], threshold: float) -> None:
    width, height = size
    for seed in range(4):
        probability = largest_region(faint(seed), threshold)
        packed = lesion_mask(probability, width, height, threshold)
        before = unpack_mask(packed, width).copy()
        mask = unpack_mask(largest_part(packed), width)
        labels, parts = ndimage.label(before)
        largest = labels == 1 + np.argmax(ndimage.sum(before, labels, range(1, parts + 1)))
        assert np.array_equal(mask, ndimage.binary_fill_holes(largest))
        assert np.array_equal(before, unpack_mask(packed, width)), "the caller's array stays"
        ((ring,),) = polygons(probability, width, height, threshold, clean=True)
        assert len(ring) >= 3


def test_an_empty_and_a_full_mask_stay() -> None:
    for value in (0, 0xFF):
        packed = np.full((5, 2), value, np.uint8)
        assert np.array_equal(largest_part(packed), packed)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 30), (640, 480)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_rings_enclose_something(size: tuple[int, int], threshold: float) -> None:
    for seed in range(4):
        probability = faint(seed)
        # Peaks that only just pass the threshold have outlines of next to nothing.
        probability[::16, ::16] = np.nextafter(np.float32(threshold), np.float32(2))
        for rings in polygons(probability, *size, threshold):
            for ring in json.loads(json.dumps(rings)):
                assert len(set(map(tuple, ring))) >= 3
                x, y = np.array(ring).T
                assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) > 1e-5
