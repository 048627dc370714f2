"""Photos that are in a data set more than once, byte for byte or nearly so."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.image import ImageError, read_photo
from model.truth import DataError

__all__ = ["groups"]

_SIDE = 32
_MOST_DIFFERENCE = 5.0
"""Mean over the thumbnail, of 255: another format, quality or size of one photo stays below."""


def groups(photos: Sequence[Path]) -> list[int]:
    """
    For each photo the index of the first that is the same, byte for byte or nearly; often its own.

    Raises:
        DataError: a photo cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        thumbnails = list(pool.map(_thumbnail, photos))
    first = list(range(len(photos)))
    if not photos:
        return first
    table = np.stack(thumbnails)
    means = table.mean(axis=1)
    for index in range(1, len(photos)):
        # Near in the mean is a necessary condition, and a cheap one.
        near = np.flatnonzero(np.abs(means[:index] - means[index]) <= _MOST_DIFFERENCE)
        difference = np.abs(table[near] - table[index]).mean(axis=1)
        for other in near[difference <= _MOST_DIFFERENCE].tolist():
            old, new = sorted((first[index], first[other]), reverse=True)
            first = [new if value == old else value for value in first]
    return first


def _thumbnail(photo: Path) -> NDArray[np.float32]:
    try:
        pixels = read_photo(photo.read_bytes(), size=_SIDE).pixels
    except (ImageError, OSError) as error:
        raise DataError(f"{photo} cannot be used: {error}") from error
    return pixels.reshape(-1).astype(np.float32)
