"""Answers of a network that are hard on what follows."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def faint(seed: int) -> NDArray[np.float32]:
    """A lesion with tails of tiny probabilities, as networks give them: rough, over decades."""
    noise = np.random.default_rng(seed).normal(size=(128, 128))
    logit = ndimage.gaussian_filter(noise, 1.2) * 14
    y, x = np.mgrid[:128, :128]
    logit += 5 - np.hypot(x - 64, y - 60) / 5
    return np.asarray(1 / (1 + np.exp(-logit)), np.float32)


def ellipse(
    width: int, height: int, long: float, short: float, degrees: float
) -> NDArray[np.float32]:
    """An ellipse in the middle of a photo, with a soft edge that is 0.5 on it.

    Args:
        width, height: the photo's, pixels.
        long, short: of the ellipse, pixels.
        degrees: from the x axis towards the y axis.
    """
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    x, y = (x - 0.5) * width, (y - 0.5) * height
    turn = np.radians(degrees)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    outwards = np.hypot(along / (long / 2), across / (short / 2))
    return np.asarray(np.clip(0.5 + 4 * (1 - outwards), 0, 1), np.float32)
