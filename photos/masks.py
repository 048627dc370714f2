"""A mask's area, box, centroid and outlines, in the forms that clients read.

`coco_rle` is hand-written: pycocotools needs a byte for each pixel, in the order of columns.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import contourpy
import numpy as np
from numpy.typing import NDArray

from photos.image import unpack_mask

__all__ = ["Figures", "Lesion", "Rings", "coco_rle", "enclosed", "figures", "measure", "polygons"]

Rings = list[list[tuple[float, float]]]
"""Closed lines of (x, y): the outer one of a part, then its holes."""

# Outlines are traced on a grid this much finer than the network's, on which straight segments
# follow the bilinear surface closely.
_OUTLINE_UPSAMPLING = 4


@dataclass(frozen=True)
class Lesion:
    """Where the lesion is, in pixels of the mask."""

    area: int
    """Pixels."""
    bounding_box: tuple[int, int, int, int] | None
    """x, y of its upper left pixel, width, height (COCO's order); None without a lesion."""
    centroid: tuple[float, float] | None
    """x, y of the mean of the lesion's pixels, whose centres are at +0.5; None without a lesion."""


@dataclass(frozen=True)
class Figures:
    """Figures of a lesion as all answers and tables give them, rounded."""

    area: int
    """Pixels of the mask."""
    area_fraction: float
    """Share of the frame, 0 to 1, in four significant digits, also for a small lesion."""
    bounding_box: tuple[int, int, int, int] | None
    """As in `Lesion`."""
    centroid: tuple[float, float] | None
    """As in `Lesion`, to a hundredth of a pixel."""
    mean_probability: float | None
    """Mean over the network's pixels above the threshold; None if there are none."""
    max_probability: float
    """The network's greatest probability, wherever it is: cleaning does not change it."""


def figures(
    raw: NDArray[np.float32],
    drawn: NDArray[np.float32],
    packed: NDArray[np.uint8],
    width: int,
    threshold: float,
) -> Figures:
    """The figures of one photo.

    Args:
        raw: the network's probability, float32 [rows, columns].
        drawn: the probability that the mask was drawn from (see `photos.regions.mask_of`).
        packed: the mask in packed bits.
        width: of the mask, pixels.
        threshold: probability above which a pixel is lesion.
    """
    lesion = measure(packed, width)
    inside = drawn[drawn > threshold]
    return Figures(
        lesion.area,
        float(f"{lesion.area / (width * len(packed)):.4g}"),
        lesion.bounding_box,
        lesion.centroid and (round(lesion.centroid[0], 2), round(lesion.centroid[1], 2)),
        round(float(inside.mean()), 4) if inside.size else None,
        round(float(raw.max()), 4),
    )


def measure(packed: NDArray[np.uint8], width: int) -> Lesion:
    """Area, bounding box and centroid of a mask in packed bits (see `photos.image.lesion_mask`)."""
    in_row = np.bitwise_count(packed).sum(axis=1, dtype=np.int64)
    area = int(in_row.sum())
    if not area:
        return Lesion(0, None, None)
    rows = np.flatnonzero(in_row)
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    bits = unpack_mask(packed[top:bottom], width)
    # Sums of uint8 over at most 255 rows fit uint8; wider sums are needed only once a block.
    in_column = sum(
        (
            bits[row : row + 255].view(np.uint8).sum(axis=0, dtype=np.uint8).astype(np.int64)
            for row in range(0, bottom - top, 255)
        ),
        np.zeros(width, np.int64),
    )
    columns = np.flatnonzero(in_column)
    left, right = int(columns[0]), int(columns[-1]) + 1
    return Lesion(
        area,
        (left, top, right - left, bottom - top),
        (_centre(in_column, area), _centre(in_row, area)),
    )


def coco_rle(packed: NDArray[np.uint8], width: int) -> dict[str, Any]:
    """COCO's compressed run-length encoding: `pycocotools.mask.decode` reads it.

    Runs go down the columns, and alternate background and lesion from a background run that may be
    empty. Each is written as the difference from the run two before it (from the fourth run on), in
    groups of 5 bits, lowest first, with a bit for "more follows", offset to printable characters
    (`rleToString` in cocoapi's maskApi.c).
    """
    columns = np.ascontiguousarray(unpack_mask(packed, width).T).reshape(-1)
    changes = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    edges = [0, *changes.tolist(), columns.size]
    if columns[0]:
        edges.insert(0, 0)
    runs = [after - before for before, after in itertools.pairwise(edges)]
    text = bytearray()
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != (-1 if group & 0x10 else 0)
            text.append((group | 0x20 if more else group) + 48)
    return {"size": [packed.shape[0], width], "counts": text.decode("ascii")}


def polygons(
    probability: NDArray[np.float32],
    width: int,
    height: int,
    threshold: float,
    *,
    clean: bool = False,
) -> list[Rings]:
    """Outlines of the lesion at a photo's size, traced on the probability itself.

    Args:
        probability: float32 [rows, columns].
        width, height: the photo's, pixels.
        threshold: what is above it is lesion.
        clean: whether to leave only the part with the largest outline, without its holes.

    Returns:
        One entry for each separate part: rings of (x, y) in pixels from the photo's upper left
        corner, the outer one first, holes after it; the first point is not repeated. What is too
        small to enclose anything, once rounded, is left out: each ring has three points or more.
    """
    rows, columns = probability.shape
    # Bilinear with half-pixel centres and clamped edges, as the mask itself is made.
    fine = _upsample(_upsample(probability, 0), 1)
    # The frame is a border too: a rim of "no lesion" just outside of it closes the outlines there.
    field = np.pad(fine.astype(np.float64), 1, mode="edge")
    rim = -1e9
    field = np.pad(field, 1, constant_values=rim)
    step = 1 / _OUTLINE_UPSAMPLING
    x = _frame_positions(columns, step) * (width / columns)
    y = _frame_positions(rows, step) * (height / rows)
    generator = contourpy.contour_generator(
        x, y, field, name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    # Just above the threshold: the mask is `>`, not `≥`.
    points, offsets = cast(
        tuple[list[NDArray[np.float64]], list[NDArray[np.uint32]]],
        generator.filled(np.nextafter(threshold, np.inf), np.inf),
    )
    parts: list[Rings] = []
    for part, offset in zip(points, offsets, strict=True):
        outer, *holes = (_ring(part[a:b]) for a, b in itertools.pairwise(offset.tolist()))
        if enclosed(outer):
            parts.append([outer, *filter(enclosed, holes)])
    if clean and parts:
        return [[max((part[0] for part in parts), key=enclosed)]]
    return parts


def enclosed(ring: list[tuple[float, float]]) -> float:
    """The area within a ring, in units of a hundredth of a pixel squared: 0 only if it is flat."""
    x, y = np.rint(np.array(ring).reshape(-1, 2).T * 100).astype(np.int64)
    return abs(int(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _ring(points: NDArray[np.float64]) -> list[tuple[float, float]]:
    """A closed line's points, to a hundredth of a pixel, without repetitions."""
    rounded = np.round(points, 2)
    is_new = (rounded[1:] != rounded[:-1]).any(axis=1)
    return [(x, y) for x, y in rounded[1:][is_new].tolist()]


def _centre(counts: NDArray[np.int64], total: int) -> float:
    return float(np.dot(counts, np.arange(len(counts)) + 0.5) / total)


def _upsample(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    size = values.shape[axis]
    position = (np.arange(size * _OUTLINE_UPSAMPLING) + 0.5) / _OUTLINE_UPSAMPLING - 0.5
    position = np.clip(position, 0, size - 1)
    before = np.minimum(position.astype(np.intp), size - 2)
    share = (position - before).astype(np.float32)
    shape = (-1, 1) if axis == 0 else (1, -1)
    first, second = np.take(values, before, axis), np.take(values, before + 1, axis)
    blended: NDArray[np.float32] = first + (second - first) * share.reshape(shape)
    return blended


def _frame_positions(size: int, step: float) -> NDArray[np.float64]:
    """Grid positions in source pixels: fine centres, then the frame's edge and its rim."""
    inner = np.arange(step / 2, size, step)
    return np.concatenate([[0, 0], inner, [size, size]])
