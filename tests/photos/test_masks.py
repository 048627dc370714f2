"""Measures and outlines of masks, against the plain way of computing them."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from photos.image import lesion_mask, unpack_mask
from photos.masks import Lesion, coco_rle, measure, polygons


def blobs(seed: int, size: int = 128) -> NDArray[np.float32]:
    """A smooth probability map with a few parts and holes, some at the frame's border."""
    coarse = np.random.default_rng(seed).random((5, 5), np.float32)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth).clip(0, 1).astype(np.float32)


def drawn(
    parts: list[list[list[tuple[float, float]]]], width: int, height: int
) -> NDArray[np.bool_]:
    """Polygons on a canvas 4 times as fine, each pixel judged near its centre."""
    canvas = Image.new("1", (width * 4, height * 4))
    draw = ImageDraw.Draw(canvas)
    for rings in parts:
        for index, ring in enumerate(rings):
            draw.polygon([(x * 4 - 0.5, y * 4 - 0.5) for x, y in ring], fill=1 - (index > 0))
    return np.asarray(canvas)[2::4, 2::4]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("width", "height"), [(640, 480), (301, 777)])
def test_polygons_enclose_what_the_mask_does(seed: int, width: int, height: int) -> None:
    probability = blobs(seed)
    mask = unpack_mask(lesion_mask(probability, width, height), width)
    parts = polygons(probability, width, height, 0.5)
    shown = drawn(parts, width, height)
    assert (shown & mask).sum() / (shown | mask).sum() > 0.99
    for rings in parts:
        points = np.concatenate([np.array(ring) for ring in rings])
        assert points.min() >= 0
        assert points[:, 0].max() <= width
        assert points[:, 1].max() <= height


def test_polygons_of_a_full_and_of_an_empty_frame() -> None:
    (whole,) = polygons(np.ones((128, 128), np.float32), 400, 300, 0.5)
    (ring,) = whole
    assert {(0, 0), (400, 0), (400, 300), (0, 300)} <= set(ring)
    assert polygons(np.zeros((128, 128), np.float32), 400, 300, 0.5) == []


def test_polygons_have_holes_after_their_outer_ring() -> None:
    probability = np.zeros((128, 128), np.float32)
    probability[20:100, 20:100] = 1
    probability[50:70, 50:70] = 0
    ((outer, hole),) = polygons(probability, 128, 128, 0.5)
    assert np.ptp(np.array(outer), axis=0) == pytest.approx([80, 80], abs=0.1)
    assert np.ptp(np.array(hole), axis=0) == pytest.approx([20, 20], abs=0.1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (300, 7), (600, 1000)])
def test_measures_by_the_definition(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(shape[0]).random(shape) < 0.3
    mask[0, 0] = True
    rows, columns = np.nonzero(mask)
    lesion = measure(np.packbits(mask, axis=1), shape[1])
    assert lesion.area == mask.sum()
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert list(lesion.bounding_box or ()) == box
    assert lesion.centroid == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))


def test_measures_of_nothing() -> None:
    assert measure(np.zeros((5, 2), np.uint8), 12) == Lesion(0, None, None)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        # By hand: columns first, background first; a run's 5-bit groups + 48.
        ([[0, 0], [0, 0]], "4"),
        ([[1, 1], [1, 1]], "04"),
        ([[1, 0], [0, 0]], "013"),
        ([[0, 0], [1, 0]], "112"),
        # Runs 1 1 1 1: the fourth is written as its difference from the second.
        ([[0, 0], [1, 1]], "1110"),
    ],
)
def test_rle_by_hand(mask: list[list[int]], counts: str) -> None:
    packed = np.packbits(np.array(mask, np.uint8), axis=1)
    assert coco_rle(packed, 2) == {"size": [2, 2], "counts": counts}
