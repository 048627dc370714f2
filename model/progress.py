"""What a run reports while it goes: lines on stderr, and events for TensorBoard."""

import math
import time

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from common.progress import TELL_EVERY_S, say, tell
from model.config import TrainConfig
from model.precision import chosen_precision, has_bf16
from model.trainer import Trainer


class RunLog:
    """Reports the progress of a run. Of several processes, one has it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        progress = trainer.progress
        # This run repeats the steps after the last checkpoint; a killed one may have logged them.
        self._writer = SummaryWriter(str(trainer.out), purge_step=progress.epoch + 1)
        self._started, self._told = time.monotonic(), -math.inf
        self._first_epoch, self._first_step = progress.epoch, progress.step
        _announce(trainer.config, trainer.device, len(trainer.ids), trainer.steps_per_epoch)

    def step(self, index: int) -> None:
        """Report the `index`-th step of the epoch (from 1), if nothing was reported for a while."""
        if time.monotonic() - self._told <= TELL_EVERY_S:
            return
        self._told = time.monotonic()
        trainer, progress = self._trainer, self._trainer.progress
        done = progress.step - self._first_step
        left = (self._told - self._started) / done * (trainer.total_steps - progress.step)
        tell(
            f"epoch {progress.epoch + 1}/{trainer.config.epochs} step {index}/"
            f"{trainer.steps_per_epoch}",
            left,
        )

    def epoch(self, row: dict[str, float]) -> None:
        """Report an epoch that has ended, with its row of the history."""
        epochs, epoch = self._trainer.config.epochs, int(row["epoch"])
        elapsed = time.monotonic() - self._started
        left = elapsed / (epoch - self._first_epoch) * (epochs - epoch)
        figures = " ".join(
            f"{k}={v:.4f}" for k, v in row.items() if k == "loss" or k.endswith("_jaccard")
        )
        tell(f"epoch {epoch}/{epochs} {figures} {row['images_per_s']:.1f} images/s", left)
        self._told = time.monotonic()
        for name, value in row.items():
            if name != "epoch":
                kind = "metric" if name.endswith(("jaccard", "selection")) else "train"
                self._writer.add_scalar(f"{kind}/{name}", value, epoch)
        if epoch % max(1, epochs // 20) == 0:
            self._draw(epoch)

    @torch.inference_mode()
    def _draw(self, epoch: int) -> None:
        trainer = self._trainer
        pixels = next(iter(trainer.selections.values()))
        images, truth = (
            F.interpolate(
                torch.from_numpy(part[:8]).to(trainer.device).float() / 255,
                size=trainer.config.size,
                mode="area",
            )
            for part in (pixels.images, pixels.masks)
        )
        found = trainer.average(images).sigmoid()
        grid = torch.cat([images, truth.expand_as(images), found.expand_as(images)], 2)
        grid = grid.permute(1, 2, 0, 3).flatten(2)  # [3, 3·H, n·W]: image, truth, prediction
        self._writer.add_image("image, truth, prediction", grid.clamp(0, 1).cpu(), epoch)

    def flush(self) -> None:
        """Write the events out. It comes before a checkpoint, so a resumed run logs none twice."""
        self._writer.flush()

    def close(self) -> None:
        """Write the events out and close their file."""
        self._writer.close()


def _announce(config: TrainConfig, device: torch.device, photos: int, steps: int) -> None:
    precision = chosen_precision(config, device)
    why = ""
    if device.type == "cpu" and not has_bf16(device):
        why = " (this processor has no bf16 instructions"
        why += ", emulated: precision=fp32 is faster)" if precision == "bf16" else ")"
    say(f"{photos} photos, {steps} steps an epoch, on {device.type} in {precision}{why}")
