"""Train SLSNet.

    python -m model.train --data ../shared/data --out runs/best             # the shipped recipe
    python -m model.train --preset paper --out runs/paper --set epochs=100  # the paper's, as a GAN
    python -m model.train --out runs/best --resume                          # after a kill
    torchrun --nproc-per-node 4 -m model.train --out runs/best              # data-parallel

A run's folder holds `config.yaml`, `last.pt` (all state, written atomically), `best.safetensors`
(the weights with the best selection Jaccard), `history.csv` and TensorBoard's events. Everything
random is a function of the seed and the step: a resumed run takes the very steps that it would have
taken.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.files import replacing
from common.program import Help, program
from common.progress import TELL_EVERY_S, say, tell
from model import duplicates, losses
from model.augment import Augmenter
from model.config import (
    PRESETS,
    ConfigError,
    TrainConfig,
    config_dict,
    load_config,
    parse_config,
    parse_overrides,
)
from model.data import (
    PixelSet,
    Sample,
    Split,
    add_data_arguments,
    find_samples,
    hold_out,
    load_pixels,
    read_groups,
    refuse_leakage,
    select,
)
from model.discriminator import Discriminator
from model.generator import Generator, save_generator
from model.metrics import LESION_ABOVE, THRESHOLD_JACCARD
from model.teacher import Teacher
from model.truth import DataError

STORED_SIZE = 256  # side at which the set is kept, pixels; augmentation warps it, then pools
SAVE_EVERY_S = 15.0  # a checkpoint at every epoch's end, but not more often than this


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stopped: bool = False  # early
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """One run: networks, optimisers, data, and the loop over them.

    Args:
        config: what to do.
        out: the run's folder.
        training: what to learn from.
        selections: named sets to choose by, the official validation set first if there is one.
        origin: what the training images are, in words, for the weights' metadata.

    Raises:
        ConfigError: the configuration does not fit the data or the number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        training: PixelSet,
        selections: dict[str, PixelSet],
        origin: str = "",
    ) -> None:
        self.config, self.out = config, out
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if cuda else 0)
        if not cuda:
            self.device = torch.device("cpu")
        if config.batch_size % self.world:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide by {self.world} processes"
            )
        if len(training.ids) < config.batch_size:
            raise ConfigError(
                f"batch_size {config.batch_size} is larger than the training set of "
                f"{len(training.ids)} images"
            )
        if cuda:
            # a graph can only be captured on a stream of its own, after warming up on the same one
            torch.cuda.set_stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
            torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.steps_per_epoch = len(training.ids) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs

        torch.manual_seed(config.seed)
        layout = torch.channels_last
        self.network: nn.Module
        if config.network == "teacher":
            self.network = Teacher()
        else:
            self.network = Generator(config.generator)
        if config.init is not None:
            _initialise(self.network, Path(config.init))
        self.network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.discriminator = Discriminator(config.discriminator).to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.network) if config.compile else self.network
        )
        self.optimizer = _optimizer(self.network, config)
        self.discriminator_optimizer = _optimizer(self.discriminator, config)
        # found once: walking hundreds of modules takes longer than averaging them
        self._averaged, self._averages = _floats(self.average), _floats(self.network)
        self.progress = Progress()
        self.graph = _StepGraph(self) if cuda and self.world == 1 and not config.compile else None

        stored = training.images.shape[-1]
        self.augmenter = Augmenter(config.augment, config.size, stored, self.device)
        self.ids, self.origin = training.ids, origin
        self.images = torch.from_numpy(training.images).to(self.device)
        targets = [training.masks]
        if config.loss.teacher:
            path = Path(cast(str, config.data.teacher))
            targets.append(_read_teacher(path, training.ids, stored))
        self.targets = torch.from_numpy(np.concatenate(targets, 1)).to(self.device)
        self.selections = selections

    def run(self) -> Progress:
        """Train to the end of the schedule, or to an early stop.

        Raises:
            TrainingError: a loss is not a number any more.
        """
        config, progress = self.config, self.progress
        if progress.stopped or progress.epoch >= config.epochs:
            return progress
        self.network.train()
        writer = self._tensorboard()
        started, first, saved = time.monotonic(), progress.epoch, -math.inf
        first_step, told = progress.step, -math.inf
        if self.rank == 0:
            _announce(config, self.device, len(self.ids), self.steps_per_epoch)
        while progress.epoch < config.epochs and not progress.stopped:
            begun = time.monotonic()
            order = torch.from_numpy(
                np.random.default_rng((config.seed, progress.epoch)).permutation(len(self.ids))
            ).to(self.device)
            sums: dict[str, Tensor] = {}
            bad = torch.full((), -1, device=self.device)
            for i in range(self.steps_per_epoch):
                batch = order[i * config.batch_size : (i + 1) * config.batch_size]
                terms = self.step(batch)
                loss = terms["loss"] + terms.get("discriminator", 0)
                # on the device, so that no step waits for the one before it
                bad = torch.where((bad < 0) & ~loss.isfinite(), progress.step, bad)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value
                progress.step += 1
                if self.rank == 0 and time.monotonic() - told > TELL_EVERY_S:
                    told = time.monotonic()
                    done = progress.step - first_step
                    left = (told - started) / done * (self.total_steps - progress.step)
                    tell(
                        f"epoch {progress.epoch + 1}/{config.epochs} step {i + 1}/"
                        f"{self.steps_per_epoch}",
                        left,
                    )
            # the last step's loss was a number before it; are the weights after it?
            finite = torch.stack([t.isfinite().all() for t in self._averages]).all()
            bad = torch.where((bad < 0) & ~finite, progress.step - 1, bad)
            if self.world > 1:
                dist.all_reduce(bad, dist.ReduceOp.MAX)
            if bad >= 0:
                raise TrainingError(
                    f"the loss is not a number at step {int(bad)} (epoch {progress.epoch + 1}); "
                    f"the last good state is {self.out / 'last.pt'}, the configuration "
                    f"{self.out / 'config.yaml'}. Try a lower learning_rate than "
                    f"{config.learning_rate}, clip_norm > 0, or precision=fp32"
                )
            seconds = time.monotonic() - begun
            progress.epoch += 1
            row: dict[str, float] = {
                "epoch": progress.epoch,
                "learning_rate": self._rate(progress.step - 1),
                "images_per_s": self.steps_per_epoch * config.batch_size / seconds,
            }
            for name, value in sums.items():
                row[name] = float(self._mean(value)) / self.steps_per_epoch
            if progress.epoch % config.validate_every == 0 or progress.epoch == config.epochs:
                row |= self.validate()
                if self.world > 1:  # one verdict for all, or they would not stop together
                    verdict = torch.tensor(row["selection"], device=self.device)
                    dist.broadcast(verdict, 0)
                    row["selection"] = float(verdict)
                if row["selection"] > progress.best:
                    progress.best, progress.best_epoch = row["selection"], progress.epoch
                    if self.rank == 0:
                        self._save_best(row)
                waited = progress.epoch - progress.best_epoch
                progress.stopped = 0 < config.early_stop <= waited
            progress.history.append(row)
            if self.rank == 0:
                elapsed = time.monotonic() - started
                left = elapsed / (progress.epoch - first) * (config.epochs - progress.epoch)
                _report(row, config.epochs, left)
                told = time.monotonic()
                if writer is not None:
                    self._log(writer, row)
                ended = progress.stopped or progress.epoch == config.epochs
                if ended or time.monotonic() - saved > SAVE_EVERY_S:
                    if writer is not None:
                        writer.flush()  # a resumed run does not log these epochs again
                    self.save()
                    saved = time.monotonic()
        if writer is not None:
            writer.close()
        return progress

    def step(self, batch: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, if there is one, and one of the generator.

        Args:
            batch: indices of the global batch's images, int64 [batch_size].

        Returns:
            The loss and its terms, detached scalars.
        """
        config, step, weights = self.config, self.progress.step, self.config.loss
        share = config.batch_size // self.world
        part = slice(self.rank * share, (self.rank + 1) * share)
        mine = batch[part]
        seed = config.seed * 1_000_003 + step
        x, y = self.augmenter(self.images[mine], self.targets[mine], seed, part, config.batch_size)
        truth, target = y[:, :1], y[:, :1]
        if weights.teacher:
            target = torch.lerp(truth, y[:, 1:], weights.teacher)
        torch.manual_seed(seed * self.world + self.rank)  # dropout: the paper's z

        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self._rate(step))
                else:
                    group["lr"] = self._rate(step)
        x = x.contiguous(memory_format=torch.channels_last)
        asleep = self._wake_or_sleep()
        if self.graph is not None:
            terms = self.graph(x, truth, target, asleep)
        else:
            terms = self.update(x, truth, target)
        self._average()
        return terms

    def update(self, x: Tensor, truth: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The update itself: nothing in it waits for the device, so that it can be captured."""
        weights = self.config.loss
        with self._autocast():
            logits = self.forward(x)
        logits = logits.float()
        probability = logits.sigmoid()
        terms: dict[str, Tensor] = {}
        if weights.adversarial:
            with self._autocast():
                real = self.discriminator(x, truth)
                fake = self.discriminator(x, probability.detach())
            terms["discriminator"] = losses.discriminator_loss(real.float(), fake.float())
            self._update(self.discriminator, self.discriminator_optimizer, terms["discriminator"])
            self.discriminator.requires_grad_(False)
            with self._autocast():
                fake = self.discriminator(x, probability)
            terms["adversarial"] = losses.adversarial_loss(fake.float())
            self.discriminator.requires_grad_(True)
        if weights.l1:
            terms["l1"] = losses.l1_loss(probability, target)
        if weights.jaccard:
            terms["jaccard_loss"] = losses.jaccard_loss(probability, target)
        if weights.bce:
            terms["bce"] = losses.bce_loss(logits, target)
        scale = {
            "adversarial": weights.adversarial,
            "l1": weights.l1,
            "jaccard_loss": weights.jaccard,
            "bce": weights.bce,
        }
        loss = torch.stack([scale[k] * v for k, v in terms.items() if k in scale]).sum()
        self._update(self.network, self.optimizer, loss)
        return {k: v.detach() for k, v in {"loss": loss, **terms}.items()}

    def _update(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= self.world
            parts = torch.split(flat, [g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_norm)
        optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        """Average weights and running statistics, the decay warmed up as timm does it."""
        step = self.progress.step
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._averages, 1 - decay)

    def _rate(self, step: int) -> float:
        config = self.config
        if config.schedule == "constant":
            return config.learning_rate
        warmup = max(1.0, config.warmup * self.total_steps)
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1.0, self.total_steps - warmup)
        return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def _wake_or_sleep(self) -> bool:
        """Half-resolution PAMs cost two thirds of a step; at η = 0 they are the identity."""
        if not isinstance(self.network, Generator):
            return False
        asleep = self.progress.step < self.config.pam_wake * self.total_steps
        for network in (self.network, self.average):
            for attention in cast(Generator, network).half_resolution_attention():
                attention.mode = "asleep" if asleep else "fused"
        return asleep

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return _autocast(self.config, self.device)

    def _mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def validate(self) -> dict[str, float]:
        """Scores of the averaged weights on every selection set (`score_selections`)."""
        self._wake_or_sleep()
        return score_selections(self.average, self.selections, self.config, self.device)

    def save(self) -> None:
        """Write `last.pt` and `history.csv`, each atomically."""
        progress = self.progress
        state = {
            "config": config_dict(self.config),
            "ids": self.ids,
            "progress": vars(progress),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }
        with replacing(self.out / "last.pt") as path:
            torch.save(state, path)
        if not progress.history:
            return
        columns = list(dict.fromkeys(k for row in progress.history for k in row))
        with replacing(self.out / "history.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(progress.history)

    def _save_best(self, row: dict[str, float]) -> None:
        figures = weights_metadata(row, self.origin, self.config.size)
        with replacing(self.out / "best.safetensors") as path:
            if isinstance(self.average, Generator):
                save_generator(self.average, path, figures)
            else:
                save_file({k: v.contiguous() for k, v in self.average.state_dict().items()}, path)

    def load(self) -> None:
        """Continue from `last.pt`.

        Raises:
            TrainingError: there is none, or it is unreadable.
            ConfigError: it belongs to another configuration, architecture or training set.
        """
        path = self.out / "last.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError as error:
            raise TrainingError(
                f"nothing to resume: {path} does not exist; start the run without --resume"
            ) from error
        except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
            raise TrainingError(f"{path} is not a readable checkpoint: {error}") from error
        theirs, ours = _flat(state["config"]), _flat(config_dict(self.config))
        if changed := [k for k in ours if theirs.get(k) != ours[k]]:
            raise ConfigError(
                f"{path} was made with {changed[0]}={theirs.get(changed[0])}, "
                f"not {ours[changed[0]]}: "
                "resume with the run's own configuration, or start another run"
            )
        if tuple(state["ids"]) != self.ids:
            raise ConfigError(f"{path} was made from another training set: pass the same --data")
        try:
            for name in (
                "network",
                "average",
                "discriminator",
                "optimizer",
                "discriminator_optimizer",
            ):
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{path} holds another architecture: {error}") from error
        self.progress = Progress(**state["progress"])

    def _tensorboard(self) -> Any:
        if self.rank:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # a killed run may have logged steps that this one takes again
        return SummaryWriter(str(self.out), purge_step=self.progress.epoch + 1)

    @torch.inference_mode()
    def _log(self, writer: Any, row: dict[str, float]) -> None:
        epoch = int(row["epoch"])
        for name, value in row.items():
            if name != "epoch":
                kind = "metric" if name.endswith(("jaccard", "selection")) else "train"
                writer.add_scalar(f"{kind}/{name}", value, epoch)
        pixels = next(iter(self.selections.values()))
        if epoch % max(1, self.config.epochs // 20) == 0:
            images = torch.from_numpy(pixels.images[:8]).to(self.device).float() / 255
            truth = torch.from_numpy(pixels.masks[:8]).to(self.device).float() / 255
            images, truth = (
                F.interpolate(t, size=self.config.size, mode="area") for t in (images, truth)
            )
            found = self.average(images).sigmoid()
            grid = torch.cat([images, truth.expand_as(images), found.expand_as(images)], 2)
            grid = grid.permute(1, 2, 0, 3).flatten(2)  # [3, 3·H, n·W]: image, truth, prediction
            writer.add_image("image, truth, prediction", grid.clamp(0, 1).cpu(), epoch)


class _StepGraph:
    """One update as a CUDA graph: launching so light a network's kernels takes longer than
    running them, several times over.
    """

    WARM_UP_STEPS = 3  # real ones, run as they are, in which libraries allocate and choose kernels

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.asleep: bool | None = None

    def __call__(self, x: Tensor, truth: Tensor, target: Tensor, asleep: bool) -> dict[str, Tensor]:
        if asleep != self.asleep:  # the PAMs woke up: another graph
            self.asleep, self.warm, self.graph = asleep, 0, None
        if self.warm < self.WARM_UP_STEPS:
            self.warm += 1
            return self.trainer.update(x, truth, target)
        if self.graph is None:
            self.inputs = [x.clone(), truth.clone(), target.clone()]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.terms = self.trainer.update(*self.inputs)
        for mine, given in zip(self.inputs, (x, truth, target), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return {name: value.clone() for name, value in self.terms.items()}


def _initialise(network: nn.Module, path: Path) -> None:
    try:
        given = load_file(path)
    except Exception as error:  # safetensors raises its own untyped errors
        raise ConfigError(f"init: {path} holds no readable weights: {error}") from error
    wanted = network.state_dict()
    both = given.keys() & wanted.keys()
    differences = {
        "missing": sorted(wanted.keys() - both),
        "unknown": sorted(given.keys() - both),
        "of another shape": sorted(n for n in both if given[n].shape != wanted[n].shape),
    }
    if told := [
        f"{len(names)} {what} (the first: {names[0]})"
        for what, names in differences.items()
        if names
    ]:
        raise ConfigError(
            f"init: {path} does not fit this network: of its {len(wanted)} tensors "
            f"{', '.join(told)}; start from weights of the same `network` and `generator`"
        )
    network.load_state_dict(given)


def _floats(network: nn.Module) -> list[Tensor]:
    return [t for t in network.state_dict(keep_vars=True).values() if t.is_floating_point()]


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # neither biases, norms nor the attentions' η and γ are pulled to zero
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    cuda = matrices[0].is_cuda
    rate = (
        torch.tensor(config.learning_rate, device=matrices[0].device)
        if cuda
        else config.learning_rate
    )
    return kind(groups, lr=rate, betas=config.betas, fused=True, capturable=cuda)


def _read_teacher(path: Path, ids: tuple[str, ...], side: int) -> np.ndarray:
    try:
        with np.load(path) as stored:
            rows = {name: i for i, name in enumerate(stored["ids"].tolist())}
            probabilities = stored["probability"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"data.teacher: {path} was not written by model.distill: {error}"
        ) from error
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _report(row: dict[str, float], epochs: int, left: float) -> None:
    figures = " ".join(
        f"{k}={v:.4f}" for k, v in row.items() if k == "loss" or k.endswith("_jaccard")
    )
    tell(f"epoch {int(row['epoch'])}/{epochs} {figures} {row['images_per_s']:.1f} images/s", left)


def _announce(config: TrainConfig, device: torch.device, photos: int, steps: int) -> None:
    precision = chosen_precision(config, device)
    why = ""
    if device.type == "cpu" and not has_bf16(device):
        why = " (this processor has no bf16 instructions"
        why += ", emulated: precision=fp32 is faster)" if precision == "bf16" else ")"
    say(f"{photos} photos, {steps} steps an epoch, on {device.type} in {precision}{why}")


@torch.inference_mode()
def score_selections(
    network: nn.Module, selections: dict[str, PixelSet], config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Per-image means on every selection set, at the stored masks' size, threshold 0.5.

    Args:
        network: images in [0, 1] → logits, in evaluation mode, on `device`.
        selections: named sets.
        config: of the run, for its input size and precision.
        device: where to compute.

    Returns:
        `<set>_jaccard` and `<set>_threshold_jaccard`; `selection`, by which weights are kept, is
        the Jaccard over the images of all of them.
    """
    row: dict[str, float] = {}
    every: list[Tensor] = []
    for name, pixels in selections.items():
        scores = []
        for start in range(0, len(pixels.ids), 64):
            images = torch.from_numpy(pixels.images[start : start + 64]).to(device)
            truth = torch.from_numpy(pixels.masks[start : start + 64]).to(device)
            masks = truth > LESION_ABOVE
            factor = images.shape[-1] // config.size
            x = F.avg_pool2d(images.float() / 255, factor) if factor > 1 else images.float() / 255
            with _autocast(config, device):
                probability = network(x).float().sigmoid()
            found = (
                F.interpolate(
                    probability, size=masks.shape[-2:], mode="bilinear", align_corners=False
                )
                > 0.5
            )
            both = (found & masks).sum((1, 2, 3)).double()
            either = (found | masks).sum((1, 2, 3)).double()
            scores.append(torch.where(either > 0, both / either.clamp_min(1), 1.0))
        jaccard = torch.cat(scores)
        every.append(jaccard)
        row[f"{name}_jaccard"] = float(jaccard.mean())
        row[f"{name}_threshold_jaccard"] = float(
            torch.where(jaccard >= THRESHOLD_JACCARD, jaccard, 0.0).mean()
        )
    row["selection"] = float(torch.cat(every).mean())
    return row


def weights_metadata(scores: Mapping[str, float], origin: str, size: int) -> dict[str, str]:
    """What a file of weights says of itself: scores (`score_selections`), origin, input's side."""
    figures = {k: f"{v:.4f}" for k, v in scores.items() if k.endswith("jaccard")}
    return {**figures, "threshold": "0.5", "training_data": origin, "size": str(size)}


def load_run(run: Path, device: torch.device) -> tuple[TrainConfig, nn.Module]:
    """A finished run's configuration and averaged network at its end, in evaluation mode.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    try:
        config = parse_config(yaml.safe_load((run / "config.yaml").read_text()))
        state = torch.load(run / "last.pt", map_location=device, weights_only=True)
    except OSError as error:
        raise ConfigError(f"{run} holds no run of model.train: {error}") from error
    progress = state["progress"]
    if progress["epoch"] < config.epochs and not progress.get("stopped"):
        raise ConfigError(f"{run} is not finished: resume it first")
    network: nn.Module
    network = Teacher() if config.network == "teacher" else Generator(config.generator)
    network.load_state_dict(state["average"])
    return config, network.to(device).eval()


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes in bf16 itself; where it emulates it, it is slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    # x86 and Arm name them so
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def chosen_precision(config: TrainConfig, device: torch.device) -> str:
    """What `precision` means on `device`: itself, or for `auto` what is faster there."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if has_bf16(device) else "fp32"


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=chosen_precision(config, device) == "bf16",
        cache_enabled=False,  # a captured graph must own its casts
    )


def prepare(
    config: TrainConfig, data: Path, cache: Path
) -> tuple[PixelSet, dict[str, PixelSet], str]:
    """Find, split, check and decode a run's images: training pixels, named selection sets, origin.

    Raises:
        DataError: naming the file or id that cannot be used.
    """
    samples = find_samples(data)
    training, selections = split_samples(config, samples, cache)
    decoded = _decode(config, samples, "training", cache)
    counts = Counter(sample.origin for sample in training)
    origin = ", ".join(f"{count} images of {name}" for name, count in sorted(counts.items()))
    pixels = {
        name: _decode(config, samples, "validation", cache)
        if name == "validation"
        else decoded.of(chosen)
        for name, chosen in selections.items()
    }
    return decoded.of(training), pixels, origin


def _decode(config: TrainConfig, samples: list[Sample], split: Split, cache: Path) -> PixelSet:
    """All of a split, whatever is trained on of it: so every fold finds it in the cache."""
    side = math.ceil(STORED_SIZE / config.size) * config.size
    # Nothing is learnt from a mask of the test set.
    uniform = config.data.allow_uniform_masks or split == "test"
    return load_pixels(select(samples, split), side, cache, uniform)


def split_samples(
    config: TrainConfig, samples: list[Sample], cache: Path
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Training samples, and the named sets to select by.

    Copies of a photo are in one fold, as are photos of one group of `config.data.groups`. Training
    photos that belong together with one of a validation or test set are left out. Both are told.

    Raises:
        DataError: there is nothing to select by, an id is in two splits, or a file cannot be used.
    """
    # between data sets ids repeat and are sorted out by `select`; within one they are a mistake
    for origin in {sample.origin for sample in samples}:
        splits: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.origin == origin:
                splits.setdefault(f"{origin}'s {sample.split} set", []).append(sample)
        refuse_leakage(splits)
    validation = select(samples, "validation")
    if not validation and not config.data.folds:
        raise DataError(
            "there is no validation set beside the training images: "
            "hold out a tenth with --set data.folds=10"
        )
    training = _grouped(config, samples, cache)
    selections = {"validation": validation} if validation else {}
    if config.data.folds:
        training, held = hold_out(training, config.data.fold, config.data.folds)
        selections["holdout"] = held
    refuse_leakage({"the training set": training, **selections})
    return training, selections


def _grouped(config: TrainConfig, samples: list[Sample], cache: Path) -> list[Sample]:
    """The training samples with their groups, without those that are held out in another file."""
    order: tuple[Split, ...] = ("training", "validation", "test")
    every = [sample for split in order for sample in select(samples, split)]
    images = (image for split in order for image in _decode(config, samples, split, cache).images)
    labels: dict[str, str] = {}
    if config.data.groups is not None:
        labels = read_groups(Path(config.data.groups), config.data.group_column)
        alone = sum(sample.id not in labels for sample in every)
        if alone == len(every):
            raise DataError(f"data.groups: {config.data.groups} holds none of the ids of the data")
        say(f"{alone} of {len(every)} photos have no {config.data.group_column}")
    first = duplicates.groups(images, [labels.get(sample.id) for sample in every])
    training = [
        dataclasses.replace(sample, group=every[index].id)
        for sample, index in zip(every, first, strict=True)
        if sample.split == "training"
    ]
    outside = {
        every[index].id: sample.id
        for sample, index in zip(every, first, strict=True)
        if sample.split != "training"
    }
    kept = [sample for sample in training if sample.group not in outside]
    why = f"or of one {config.data.group_column} " if labels else ""
    _tell_pairs(
        f"left out of training, copies {why}of validation or test photos",
        [(sample.id, outside[sample.group]) for sample in training if sample.group in outside],
    )
    _tell_pairs(
        f"in one fold, copies {why}of other training photos",
        [(sample.id, sample.group) for sample in kept if sample.group != sample.id],
    )
    return kept


def _tell_pairs(what: str, pairs: list[tuple[str, str]]) -> None:
    """Say which ids are so for the sake of which others."""
    if pairs:
        more = ", …" if len(pairs) > 5 else ""
        shown = ", ".join(f"{one} = {other}" for one, other in pairs[:5])
        say(f"{what} ({len(pairs)}): {shown}{more}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog=program("model.train"),
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--preset", default="best", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--config", type=Path, help="YAML file of changes to the preset")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args(argv)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        progress = _run(args)
    except (ConfigError, DataError, TrainingError) as error:
        parser.exit(2, f"error: {error}\n")
    finally:
        if world > 1:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"best selection Jaccard {progress.best:.4f} at epoch {progress.best_epoch}")


def _run(args: argparse.Namespace) -> Progress:
    saved = args.out / "config.yaml"
    if args.resume:
        try:
            config = parse_config(yaml.safe_load(saved.read_text()))
        except OSError as error:
            raise TrainingError(
                f"nothing to resume: {saved} does not exist; start the run without --resume"
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{saved} is not a readable YAML file: {error}") from error
        if args.config or args.set:
            raise ConfigError(
                f"--resume takes the run's own {saved}: leave --config and --set out, "
                "or start another run"
            )
    else:
        config = load_config(args.preset, args.config, parse_overrides(args.set))
    return train(config, args.data, args.out, args.cache, resume=args.resume)


def train(
    config: TrainConfig, data: Path, out: Path, cache: Path, *, resume: bool = False
) -> Progress:
    """Train in the folder `out`, from the start or from where it was left.

    Args:
        config: what to do; a run that is resumed must have been started with the same.
        data: folder of data sets.
        out: the run's folder.
        cache: folder of decoded pixels.
        resume: whether to go on with the run in `out`.

    Raises:
        ConfigError: the configuration does not fit, or `out` holds a run that is not resumed.
        DataError: naming the file or id that cannot be used.
        TrainingError: there is nothing to resume, or a loss is not a number any more.
    """
    if not resume and (out / "last.pt").exists():
        raise ConfigError(f"{out} holds a run: pass --resume, or another --out")
    pixels, selections, origin = prepare(config, data, cache)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, out, pixels, selections, origin)
    if resume:
        trainer.load()
    else:
        if trainer.world > 1:
            dist.barrier()  # every process has seen that no run was there
        if trainer.rank == 0:
            with replacing(out / "config.yaml") as path:
                path.write_text(yaml.safe_dump(config_dict(config), sort_keys=False))
            trainer.save()  # so that a kill in the first epoch can be resumed too
    return trainer.run()


if __name__ == "__main__":
    main()
