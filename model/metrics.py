"""How well masks match the truth. Pixels are counted once per image; all figures follow from that.

Figures are per image, then averaged over images (macro), as the ISIC challenges score them
(PyPI `isic-challenge-scoring`; a test compares both). A figure that would divide by 0 is 1. It is
hand-written because that package needs a compiler and many others; this needs numpy only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Figures = NDArray[np.float64]

THRESHOLD_JACCARD = 0.65
"""In `threshold_jaccard`, a Jaccard below this counts as 0 (ISIC 2018: about the Jaccard of two
experts' outlines of one lesion)."""


@dataclass(frozen=True)
class Confusion:
    """Pixels by truth and prediction: four int64 arrays of one shape, a number for each image."""

    tp: Counts
    fp: Counts
    fn: Counts
    tn: Counts


def count(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Confusion:
    """Count the pixels of masks.

    Args:
        prediction: bool [..., height, width].
        truth: bool, of the same shape.

    Returns:
        Counts of shape [...].

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"the prediction has shape {prediction.shape}, its truth {truth.shape}: up-sample the"
            " probabilities to the truth's size first"
        )
    axes = (-2, -1)
    tp = np.count_nonzero(prediction & truth, axis=axes)
    return _confusion(
        tp,
        np.count_nonzero(prediction, axis=axes),
        np.count_nonzero(truth, axis=axes),
        truth.shape[-2] * truth.shape[-1],
    )


def count_packed(prediction: NDArray[np.uint8], truth: NDArray[np.uint8], pixels: int) -> Confusion:
    """Count the pixels of one mask in packed bits, as `photos.image.lesion_mask` returns them.

    Args:
        prediction: uint8 [height, ceil(width / 8)], padding bits 0.
        truth: the true mask, packed in the same way.
        pixels: number of pixels in the mask, width × height.
    """
    return _confusion(_ones(prediction & truth), _ones(prediction), _ones(truth), pixels)


def stack(images: Sequence[Confusion]) -> Confusion:
    """Join counts along the first axis; each may hold one image or several."""

    def joined(counts: Iterable[Counts]) -> Counts:
        return np.concatenate([np.atleast_1d(np.asarray(n, np.int64)) for n in counts])

    return Confusion(
        joined(c.tp for c in images),
        joined(c.fp for c in images),
        joined(c.fn for c in images),
        joined(c.tn for c in images),
    )


def accuracy(c: Confusion) -> Figures:
    """(tp + tn) / all, per image."""
    return _share(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def dice(c: Confusion) -> Figures:
    """2 tp / (2 tp + fp + fn), per image."""
    return _share(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def jaccard(c: Confusion) -> Figures:
    """Tp / (tp + fp + fn), per image."""
    return _share(c.tp, c.tp + c.fp + c.fn)


def sensitivity(c: Confusion) -> Figures:
    """Tp / (tp + fn), per image."""
    return _share(c.tp, c.tp + c.fn)


def specificity(c: Confusion) -> Figures:
    """Tn / (tn + fp), per image."""
    return _share(c.tn, c.tn + c.fp)


def threshold_jaccard(c: Confusion) -> Figures:
    """The Jaccard where it is at least `THRESHOLD_JACCARD`, else 0, per image."""
    values = jaccard(c)
    return np.where(values >= THRESHOLD_JACCARD, values, 0.0)


METRICS: dict[str, Callable[[Confusion], Figures]] = {
    "accuracy": accuracy,
    "dice": dice,
    "jaccard": jaccard,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "threshold_jaccard": threshold_jaccard,
}
"""The figures of a report, by their keys in it."""


def macro_average(c: Confusion) -> dict[str, float]:
    """The mean of each of `METRICS` over the images."""
    return {name: float(metric(c).mean()) for name, metric in METRICS.items()}


class Calibration:
    """Tells whether a probability of 0.7 means that 70 % of such pixels are lesion.

    Images are added one by one. Each weighs the same, however many pixels it has.

    Args:
        bins: number of equal bins that the probabilities 0…1 are sorted into.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._weight = np.zeros(bins)
        self._confidence = np.zeros(bins)
        self._lesion = np.zeros(bins)

    def add(
        self, probability: NDArray[np.float32], truth: NDArray[np.bool_] | NDArray[np.float32]
    ) -> None:
        """Add an image.

        Args:
            probability: the network's answer, 0 to 1.
            truth: the mask in the same shape, or the share of lesion in each pixel, 0 to 1.
        """
        where = np.minimum((probability * self.bins).astype(np.intp), self.bins - 1).ravel()
        pixels = probability.size
        self._weight += np.bincount(where, minlength=self.bins) / pixels
        confidence = np.bincount(where, probability.ravel(), self.bins)
        self._confidence += confidence / pixels
        self._lesion += np.bincount(where, truth.ravel(), self.bins) / pixels

    def curve(self) -> tuple[Figures, Figures, Figures]:
        """For each bin with pixels: mean probability, share of lesion, share of all pixels."""
        held = self._weight > 0
        weight = self._weight[held]
        return (
            self._confidence[held] / weight,
            self._lesion[held] / weight,
            weight / self._weight.sum(),
        )

    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3): 0 is perfect; NaN: no images."""
        if not self._weight.any():
            return float("nan")
        confidence, lesion, share = self.curve()
        return float(np.sum(share * np.abs(confidence - lesion)))


def _confusion(tp: Any, predicted: Any, lesion: Any, pixels: int) -> Confusion:
    tp, predicted, lesion = (np.asarray(n, np.int64) for n in (tp, predicted, lesion))
    return Confusion(tp, predicted - tp, lesion - tp, pixels - predicted - lesion + tp)


def _ones(packed: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(packed).sum(dtype=np.int64))


def _share(part: Counts, whole: Counts) -> Figures:
    return np.divide(part, whole, out=np.ones(part.shape), where=whole != 0)
