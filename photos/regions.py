"""One lesion a photo: the largest region of a probability map, without its holes.

A dermoscopic photo is framed on one lesion, but networks sometimes see a second one in hair, ink or
a colour patch. It is hand-written because scipy, which could label regions, is not installed where
the network is served.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from photos.image import THRESHOLD, lesion_mask

__all__ = ["largest_part", "largest_region", "mask_of"]


def mask_of(
    probability: NDArray[np.float32], width: int, height: int, threshold: float, *, clean: bool
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A mask at a photo's size, and the probability that it is drawn from.

    Args:
        probability: float32 [rows, columns].
        width, height: of the mask, pixels.
        threshold: probability above which a pixel is lesion.
        clean: whether to leave only the largest region, without its holes, in both.

    Returns:
        The probability, and packed bits as `photos.image.lesion_mask` returns them.
    """
    if not clean:
        return probability, lesion_mask(probability, width, height, threshold)
    cleaned = largest_region(probability, threshold)
    return cleaned, largest_part(lesion_mask(cleaned, width, height, threshold))


def largest_region(
    probability: NDArray[np.float32],
    threshold: float = THRESHOLD,
    *,
    around: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Leave only the largest region above `threshold`, and fill its holes.

    Pixels are joined by edges, not by corners, so that up-sampling does not split the region. A
    hole is background that is cut off from the frame.

    Args:
        probability: float32 [rows, columns].
        threshold: probability above which a pixel is lesion.
        around: bool [rows, columns]; leave the region that has most of it, and the largest one only
            if none has any.

    Returns:
        A copy, in which other regions are 0 and holes 1.
    """
    lesion = probability > threshold
    cleaned = probability.copy()
    regions = _regions(lesion)
    if not regions:
        return cleaned
    kept = max(regions, key=lambda region: (_shared(region, around), _area(region)))
    for region in regions:
        if region is not kept:
            _fill(cleaned, region, 0)
    mask = np.zeros_like(lesion)
    _fill(mask, kept, True)
    # A border of background around the frame joins all the background that is not a hole.
    for hole in _regions(np.pad(~mask, 1, constant_values=True)):
        if hole[0][0] > 0:
            _fill(cleaned, [(row - 1, start - 1, end - 1) for row, start, end in hole], 1)
    return cleaned


def largest_part(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Leave only the largest region of a mask, and fill its holes, at the mask's own size.

    A region that is connected in the probabilities can, once up-sampled, be thinner than a pixel
    somewhere, above all at low thresholds. Then it has several parts.

    Args:
        packed: bits as `photos.image.lesion_mask` returns them.

    Returns:
        A copy, or `packed` itself if there is nothing to do.
    """
    regions = _connected(_packed_runs(packed))
    if not regions:
        return packed
    kept = max(regions, key=_area)
    holes = [r for r in _connected(_around(kept)) if r[0][0] >= kept[0][0]]
    if len(regions) == 1 and not holes:
        return packed
    cleaned = packed.copy()
    changed = [(run, 0) for region in regions if region is not kept for run in region]
    changed += [(run, 1) for hole in holes for run in hole]
    for (row, start, end), value in changed:
        first, last = start // 8, -(-end // 8)
        bits = np.unpackbits(cleaned[row, first:last])
        bits[start - first * 8 : end - first * 8] = value
        cleaned[row, first:last] = np.packbits(bits)
    return cleaned


_Run = tuple[int, int, int]
"""Row, first column, column after the last."""


def _regions(mask: NDArray[np.bool_]) -> list[list[_Run]]:
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return _connected(list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)))


def _packed_runs(packed: NDArray[np.uint8]) -> list[_Run]:
    """The runs of packed bits, by rows; only bytes where a run begins or ends are unpacked."""
    here = np.pad(packed, ((0, 0), (0, 1)))
    before = here >> np.uint8(1)
    before[:, 1:] |= here[:, :-1] << np.uint8(7)
    rows, starts = _bits(here & ~before)
    _, ends = _bits(before & ~here)
    return list(zip(rows, starts, ends, strict=True))


def _bits(packed: NDArray[np.integer[Any]]) -> tuple[list[int], list[int]]:
    rows, columns = np.nonzero(packed)
    which, bit = np.nonzero(np.unpackbits(packed[rows, columns, None].astype(np.uint8), axis=1))
    return rows[which].tolist(), (columns[which] * 8 + bit).tolist()


def _around(region: list[_Run]) -> list[_Run]:
    """The background of `region`, in a box that is a pixel larger than it on each side."""
    left, right = min(run[1] for run in region) - 1, max(run[2] for run in region) + 1
    outside = [(region[0][0] - 1, left, right)]
    for row, runs in itertools.groupby(region, key=lambda run: run[0]):
        start = left
        for _, first, last in runs:
            outside.append((row, start, first))
            start = last
        outside.append((row, start, right))
    return [*outside, (region[-1][0] + 1, left, right)]


def _connected(runs: list[_Run]) -> list[list[_Run]]:
    """The runs of each connected region, from the top; `runs` are in reading order.

    Runs of adjacent rows that overlap belong together (union-find on runs; Rosenfeld and Pfaltz,
    1966).
    """
    parent = list(range(len(runs)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    before = -2
    for row, group in itertools.groupby(range(len(runs)), key=lambda index: runs[index][0]):
        here = list(group)
        if row == before + 1:
            upper = lower = 0
            while upper < len(above) and lower < len(here):
                (_, start, end), (_, first, last) = runs[above[upper]], runs[here[lower]]
                if start < last and first < end:
                    parent[root(here[lower])] = root(above[upper])
                if end < last:
                    upper += 1
                else:
                    lower += 1
        above, before = here, row
    found: dict[int, list[_Run]] = {}
    for index, run in enumerate(runs):
        found.setdefault(root(index), []).append(run)
    return list(found.values())


def _area(region: list[_Run]) -> int:
    return sum(end - start for _, start, end in region)


def _shared(region: list[_Run], mask: NDArray[np.bool_] | None) -> int:
    """How many pixels of `mask` are in a region."""
    if mask is None:
        return 0
    return sum(int(np.count_nonzero(mask[row, start:end])) for row, start, end in region)


def _fill(pixels: NDArray[np.generic], region: list[_Run], value: float) -> None:
    for row, start, end in region:
        pixels[row, start:end] = value
