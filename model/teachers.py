"""Teachers that see the very view of an image that the student learns from.

A target that was computed once, before training (`model.distill`), belongs to the image as it is
stored; augmentation only bends it along. These teachers are asked at every step instead, about the
view that augmentation made. So the student learns what they do, and not one answer for each image
(Beyer et al. 2021, arXiv:2106.05237).
"""

import hashlib
import zipfile
import zlib
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
from model.trainer import Trainer


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
            why = "this run holds out: take teachers that held out the same fold"
            refuse_seen(folder, run.ids, held_out, why)
        except ConfigError as error:
            raise ConfigError(f"data.teachers: {error}") from error
        row[:] = [name not in run.ids for name in ids]
        networks.append((run.config, run.network))
    judges |= ~judges.any(0)
    return Teachers(networks, judges)


def read_targets(
    path: Path, ids: Sequence[str], held_out: Collection[str], side: int
) -> NDArray[np.uint8]:
    """Read a file of `model.distill`: probabilities of 0 to 255, uint8 [ids, 1, side, side].

    Args:
        ids: the training images of the student.
        held_out: images that the student is chosen by, or scored on.
        side: side of the result, pixels.

    Raises:
        ConfigError: it is no such file, lacks an image, or comes of runs that were trained on an
            image that the student holds out.
    """
    damaged = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)
    try:
        with path.open("rb") as file, np.load(file) as stored:
            rows = {name: i for i, name in enumerate(stored["ids"].tolist())}
            probabilities = stored["probability"]
            # The first files did not say what their runs had seen.
            seen = stored["seen"].tolist() if "seen" in stored else []
    except damaged as error:
        raise ConfigError(
            f"data.teacher: {path} was not written by model.distill: {error}"
        ) from error
    why = "this run holds out: leave data.folds out, or run model.distill on this data"
    refuse_seen(f"data.teacher: a run of {path}", seen, held_out, why)
    if missing := [name for name in ids if name not in rows]:
        raise ConfigError(
            f"data.teacher: {path} lacks {missing[0]}; run model.distill on this data"
        )
    chosen = torch.from_numpy(probabilities[[rows[name] for name in ids]])[:, None]
    parts = [
        F.interpolate(part.float(), size=(side, side), mode="bilinear", align_corners=False)
        for part in torch.split(chosen, 64)
    ]
    return torch.cat([part.round().byte() for part in parts]).numpy()


def attach(trainer: Trainer) -> None:
    """Give a run what its configuration has it taught by, unless that has no share of the target.

    Raises:
        ConfigError: a teacher cannot teach this run, or has changed since it began.
    """
    config, data = trainer.config.loss, trainer.config.data
    if not config.teacher:
        return
    held_out = {name for photos in trainer.selections.values() for name in photos.ids}
    if data.teacher:
        told = read_targets(Path(data.teacher), trainer.ids, held_out, trainer.targets.shape[-1])
        given = torch.from_numpy(told).to(trainer.device)
        trainer.targets = torch.cat([trainer.targets, given], 1)
        key, files = "data.teacher", [Path(data.teacher)]
    else:
        trainer.teach = read_teachers(data.teachers, trainer.ids, held_out, trainer.device)
        key, files = "data.teachers", [Path(run) / "last.pt" for run in data.teachers]
    now = [_sha256(file) for file in files]
    for file, then, digest in zip(files, trainer.taught_by or now, now, strict=True):
        if then != digest:
            raise ConfigError(
                f"{key}: {file} has changed since this run began: put the former one back, "
                "or start another run"
            )
    trainer.taught_by = now


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
