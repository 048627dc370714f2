"""Takes a run from its start, or its last checkpoint, to its end: epochs, validation, selection."""

import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from common.files import replacing
from model import checkpoint
from model.config import ConfigError, TrainConfig, config_dict, with_absolute_paths
from model.networks import check_network
from model.progress import RunLog
from model.scoring import score_selections
from model.splits import prepare
from model.teachers import attach
from model.trainer import RunProgress, Trainer, TrainingError

SAVE_EVERY_S = 15.0  # a checkpoint at every epoch's end, but not more often than this


def train(
    config: TrainConfig, data: Path, out: Path, cache: Path, *, resume: bool = False
) -> RunProgress:
    """Train in the folder `out`, from the start or the last checkpoint.

    Args:
        config: the configuration; a resumed run must have been started with the same.
        resume: whether to go on with the run in `out`.

    Raises:
        ConfigError: the configuration does not fit, or `out` holds a run that is not resumed, or
            another process trains there.
        DataError: a file or id cannot be used; the message names it.
        TrainingError: there is nothing to resume, a loss is no number any more, or a file cannot be
            written.
    """
    config = with_absolute_paths(config)  # so that it can be resumed from another folder
    if not resume:
        _refuse_run(out)
    check_network(config)
    pixels, selections, origin = prepare(config, data, cache)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, out, pixels, selections, origin, fresh=not resume)
    with checkpoint.alone(out) if trainer.rank == 0 else nullcontext():
        if resume:
            checkpoint.load(trainer)
            if trainer.rank == 0:
                checkpoint.write_history(trainer)  # a kill may have come between the two files
        elif trainer.rank == 0:
            _refuse_run(out)  # another process may have begun, and even ended, meanwhile
        if not trainer.progress.is_over(config.epochs):
            attach(trainer)
        if not resume:
            if trainer.world > 1:
                dist.barrier()  # every process has seen that no run was there
            if trainer.rank == 0:
                with replacing(out / "config.yaml") as path:
                    path.write_text(yaml.safe_dump(config_dict(config), sort_keys=False))
                checkpoint.save(trainer)  # so that a kill in the first epoch can be resumed too
        return run(trainer)


def _refuse_run(out: Path) -> None:
    if (out / "last.pt").exists():
        raise ConfigError(f"{out} holds a run: pass --resume, or another --out")


def run(trainer: Trainer) -> RunProgress:
    """Train to the end of the schedule, or to an early stop.

    Raises:
        TrainingError: a loss is no number any more, or a file cannot be written.
    """
    config, progress = trainer.config, trainer.progress
    if progress.is_over(config.epochs):
        return progress
    trainer.network.train()
    log = RunLog(trainer) if trainer.rank == 0 else None
    saved = -math.inf
    while not progress.is_over(config.epochs):
        row = _epoch(trainer, log)
        if progress.epoch % config.validate_every == 0 or progress.epoch == config.epochs:
            row |= _select(trainer)
        progress.history.append(row)
        if log is not None:
            log.epoch(row)
            if progress.is_over(config.epochs) or time.monotonic() - saved > SAVE_EVERY_S:
                log.flush()
                checkpoint.save(trainer)
                saved = time.monotonic()
    if log is not None:
        log.close()
    return progress


def validate(trainer: Trainer) -> dict[str, float]:
    """Score the averaged weights on every selection set (`score_selections`)."""
    trainer.wake_or_sleep()
    return score_selections(trainer.average, trainer.selections, trainer.config, trainer.device)


def _epoch(trainer: Trainer, log: RunLog | None) -> dict[str, float]:
    """Take the steps of one epoch; return its row of the history, without scores."""
    config, progress, device = trainer.config, trainer.progress, trainer.device
    begun = time.monotonic()
    order = torch.from_numpy(
        np.random.default_rng((config.seed, progress.epoch)).permutation(len(trainer.ids))
    ).to(device)
    sums: dict[str, Tensor] = {}
    bad = torch.full((), -1, device=device)
    for i in range(trainer.steps_per_epoch):
        terms = trainer.step(order[i * config.batch_size : (i + 1) * config.batch_size])
        loss = terms["loss"] + terms.get("discriminator", 0)
        # kept on the device, so that no step waits for the one before it
        bad = torch.where((bad < 0) & ~loss.isfinite(), progress.step, bad)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value
        progress.step += 1
        if log is not None:
            log.step(i + 1)
    _refuse_nan(trainer, bad)
    seconds = time.monotonic() - begun
    progress.epoch += 1
    row: dict[str, float] = {
        "epoch": progress.epoch,
        "learning_rate": trainer.rate(progress.step - 1),
        "images_per_s": trainer.steps_per_epoch * config.batch_size / seconds,
    }
    for name, value in sums.items():
        row[name] = float(trainer.mean(value)) / trainer.steps_per_epoch
    return row


def _refuse_nan(trainer: Trainer, bad: Tensor) -> None:
    """Raise if a loss of this epoch was no number; `bad` is the first such step, or -1."""
    # The loss of the last step came before its update, so the weights after it are checked too.
    finite = trainer.weights_are_finite()
    bad = torch.where((bad < 0) & ~finite, trainer.progress.step - 1, bad)
    if trainer.world > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    if bad >= 0:
        raise TrainingError(
            f"the loss is not a number at step {int(bad)} (epoch {trainer.progress.epoch + 1}); "
            f"the last good state is {trainer.out / 'last.pt'}, the configuration "
            f"{trainer.out / 'config.yaml'}. Try a lower learning_rate than "
            f"{trainer.config.learning_rate}, clip_norm > 0, or precision=fp32"
        )


def _select(trainer: Trainer) -> dict[str, float]:
    """Score the averaged weights, keep them if they are the best so far, or stop early."""
    progress = trainer.progress
    scores = validate(trainer)
    if trainer.world > 1:  # one verdict for all, or they would not stop together
        verdict = torch.tensor(scores["selection"], device=trainer.device)
        dist.broadcast(verdict, 0)
        scores["selection"] = float(verdict)
    if scores["selection"] > progress.best:
        progress.best, progress.best_epoch = scores["selection"], progress.epoch
        if trainer.rank == 0:
            checkpoint.save_best(trainer, scores)
    progress.stopped = 0 < trainer.config.early_stop <= progress.epoch - progress.best_epoch
    return scores
