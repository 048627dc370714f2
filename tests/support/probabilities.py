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
