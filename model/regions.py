"""One lesion a photo: the largest region of a probability map, without its holes.

Networks see a second lesion in hair, ink or a colour patch now and then; dermoscopic photos are
framed on one.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest_region"]


def largest_region(probability: NDArray[np.float32], threshold: float = 0.5) -> NDArray[np.float32]:
    """
    Leave only the largest region above `threshold`, and fill its holes.

    Pixels are joined by edges, not by corners, so that up-sampling does not part the region. Holes
    are what cannot be reached from the frame.

    Args:
        probability: float32 [rows, columns].
        threshold: probability above which a pixel is lesion.

    Returns:
        A copy: other regions are 0, holes 1, all the rest as it was.
    """
    lesion = probability > threshold
    cleaned = probability.copy()
    regions = _regions(lesion)
    if not regions:
        return cleaned
    kept = max(regions, key=_area)
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


_Run = tuple[int, int, int]
"""Row, first column, column after the last."""


def _regions(mask: NDArray[np.bool_]) -> list[list[_Run]]:
    """Connected regions as their runs, from the top.

    Runs of adjacent rows that overlap belong together (union-find on runs; Rosenfeld and Pfaltz,
    1966).
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs: list[_Run] = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
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
            for upper, lower in itertools.product(above, here):
                (_, start, end), (_, first, last) = runs[upper], runs[lower]
                if start < last and first < end:
                    parent[root(lower)] = root(upper)
        above, before = here, row
    found: dict[int, list[_Run]] = {}
    for index, run in enumerate(runs):
        found.setdefault(root(index), []).append(run)
    return list(found.values())


def _area(region: list[_Run]) -> int:
    return sum(end - start for _, start, end in region)


def _fill(pixels: NDArray[np.generic], region: list[_Run], value: float) -> None:
    for row, start, end in region:
        pixels[row, start:end] = value
