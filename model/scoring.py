"""Scores of a network's probabilities against the masks of a set that is held as pixels.

Training, averaging and distillation use it. `model.evaluate` scores files at their own sizes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from model.config import TrainConfig
from model.data import PixelSet
from model.metrics import Confusion, count, jaccard, stack, threshold_jaccard
from model.precision import autocast
from model.truth import is_lesion
from photos.image import THRESHOLD

_BATCH = 64


def confusion(probability: NDArray[np.floating], grey: NDArray[np.uint8]) -> Confusion:
    """Count pixels where a probability above `THRESHOLD` is lesion.

    Args:
        probability: float [images, height, width], 0 to 1.
        grey: the stored masks, uint8 of the same shape; `model.truth` says which values are lesion.

    Returns:
        Counts of shape [images].

    Raises:
        ValueError: the shapes differ.
    """
    return count(probability > THRESHOLD, is_lesion(grey))


@torch.inference_mode()
def score_selections(
    network: nn.Module, selections: dict[str, PixelSet], config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Score the network on every selection set, at the stored masks' size, by means over images.

    Args:
        network: turns images in [0, 1] into logits; in evaluation mode, on `device`.
        config: the run's configuration, for its input size and precision.

    Returns:
        `<set>_jaccard` and `<set>_threshold_jaccard` of every set, and `selection`, the Jaccard
        over the images of all sets. The weights with the best `selection` are kept.
    """
    row: dict[str, float] = {}
    every: list[NDArray[np.float64]] = []
    for name, pixels in selections.items():
        parts = []
        for start in range(0, len(pixels.ids), _BATCH):
            part = slice(start, start + _BATCH)
            x = torch.from_numpy(pixels.images[part]).to(device).float() / 255
            factor = x.shape[-1] // config.size
            with autocast(config, device):
                logits = network(F.avg_pool2d(x, factor) if factor > 1 else x)
            probability = F.interpolate(
                logits.float().sigmoid(),
                size=pixels.masks.shape[-2:],
                mode="bilinear",
                align_corners=False,
            )
            parts.append(confusion(probability[:, 0].cpu().numpy(), pixels.masks[part, 0]))
        counts = stack(parts)
        every.append(jaccard(counts))
        row[f"{name}_jaccard"] = float(every[-1].mean())
        row[f"{name}_threshold_jaccard"] = float(threshold_jaccard(counts).mean())
    row["selection"] = float(np.concatenate(every).mean())
    return row
