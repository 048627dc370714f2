"""Teachers that see the very view of an image that the student learns from.

A target that was computed once, before training (`model.distill`), belongs to the image as it is
stored; augmentation only bends it along. These teachers are asked at every step instead, about the
view that augmentation made. So the student learns what they do, and not one answer for each image
(Beyer et al. 2021, arXiv:2106.05237).
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.checkpoint import load_run, refuse_seen
from model.config import ConfigError, TrainConfig
from model.precision import autocast

HELD_OUT = "this run holds out: take teachers that held out the same fold"


class Teachers:
    """Networks, and the images that each of them judges.

    Args:
        networks: networks in evaluation mode (images in [0, 1] → logits), each with the
            configuration that it was trained with.
        judges: bool [networks, images]; every image has a judge.
    """

    def __init__(
        self, networks: Sequence[tuple[TrainConfig, nn.Module]], judges: NDArray[np.bool_]
    ) -> None:
        self.networks = networks
        self.judges = torch.from_numpy(judges)

    @torch.no_grad()
    def __call__(self, views: Tensor, images: Tensor) -> Tensor:
        """Judge a batch: the mean probability of the teachers that judge an image.

        Args:
            views: float32 [n, 3, size, size] in [0, 1], as the student gets them.
            images: int64 [n], which training images they are views of.

        Returns:
            float32 [n, 1, size, size].
        """
        side = views.shape[-1]
        judges = self.judges[:, images.cpu()]
        total = torch.zeros_like(views[:, :1])
        for (config, network), judged in zip(self.networks, judges, strict=True):
            rows = judged.nonzero()[:, 0].to(views.device)
            if not len(rows):
                continue
            view = _resize(views[rows], config.size)
            with autocast(config, views.device):
                logits = network(view.contiguous(memory_format=torch.channels_last))
            total[rows] += _resize(logits.float().sigmoid(), side)
        return total / judges.sum(0).to(views.device)[:, None, None, None]


def _resize(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=side, mode="bilinear", align_corners=False, antialias=True)


def read_teachers(
    runs: Sequence[str], ids: Sequence[str], held_out: Collection[str], device: torch.device
) -> Teachers:
    """Read finished runs. Those not trained on an image judge it; if there is none, all judge it.

    Args:
        runs: their folders.
        ids: the training images of the student.
        held_out: images that the student is chosen by, or scored on.

    Raises:
        ConfigError: a run is unfinished, or was trained on an image that the student holds out,
            which the student would then learn of.
    """
    networks = []
    judges = np.zeros((len(runs), len(ids)), np.bool_)
    for row, folder in zip(judges, runs, strict=True):
        try:
            run = load_run(Path(folder), device)
            refuse_seen(folder, run.ids, held_out, HELD_OUT)
        except ConfigError as error:
            raise ConfigError(f"data.teachers: {error}") from error
        row[:] = [name not in run.ids for name in ids]
        networks.append((run.config, run.network))
    judges |= ~judges.any(0)
    return Teachers(networks, judges)
