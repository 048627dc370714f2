"""The folder of a run: its files are written and read here; one that does not fit is refused."""

import csv
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from common.files import replacing
from model.config import ConfigError, TrainConfig, config_dict, parse_config
from model.networks import new_network, save_network
from model.trainer import RunProgress, Trainer, TrainingError
from photos.image import THRESHOLD

_STATES = ("network", "average", "discriminator", "optimizer", "discriminator_optimizer")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other processes from training in the folder `out`; a killed one keeps nobody out.

    Raises:
        ConfigError: another process trains there.
    """
    descriptor = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process trains in {out}: wait for it, or pass another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def save(trainer: Trainer) -> None:
    """Write `last.pt` and `history.csv`, each atomically."""
    progress = trainer.progress
    state = {
        "config": config_dict(trainer.config),
        "ids": trainer.ids,
        "progress": vars(progress),
        **{name: getattr(trainer, name).state_dict() for name in _STATES},
    }
    with replacing(trainer.out / "last.pt") as path:
        torch.save(state, path)
    if not progress.history:
        return
    columns = list(dict.fromkeys(k for row in progress.history for k in row))
    with replacing(trainer.out / "history.csv") as path, path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(progress.history)


def load(trainer: Trainer) -> None:
    """Continue from the checkpoint `last.pt`.

    Raises:
        TrainingError: there is no checkpoint, or it is unreadable.
        ConfigError: the checkpoint belongs to another configuration, architecture or training set.
    """
    path = trainer.out / "last.pt"
    try:
        state = torch.load(path, map_location=trainer.device, weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(
            f"nothing to resume: {path} does not exist; start the run without --resume"
        ) from error
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        raise TrainingError(f"{path} is not a readable checkpoint: {error}") from error
    ours = _flat(config_dict(trainer.config))
    # A key that the run did not know yet has its default.
    theirs = _flat(config_dict(TrainConfig())) | _flat(state["config"])
    if changed := [k for k in ours if theirs.get(k) != ours[k]]:
        raise ConfigError(
            f"{path} was made with {changed[0]}={theirs.get(changed[0])}, "
            f"not {ours[changed[0]]}: "
            "resume with the run's own configuration, or start another run"
        )
    if tuple(state["ids"]) != trainer.ids:
        raise ConfigError(f"{path} was made from another training set: pass the same --data")
    try:
        for name in _STATES:
            getattr(trainer, name).load_state_dict(state[name])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} holds another architecture: {error}") from error
    trainer.progress = RunProgress(**state["progress"])


def save_best(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Write the averaged weights as `best.safetensors`, with the scores of `row`."""
    figures = weights_metadata(row, trainer.origin, trainer.config.size)
    with replacing(trainer.out / "best.safetensors") as path:
        save_network(trainer.average, path, figures)


def weights_metadata(scores: Mapping[str, float], origin: str, size: int) -> dict[str, str]:
    """Metadata for a file of weights: the scores (`score_selections`), `origin`, input side."""
    figures = {k: f"{v:.4f}" for k, v in scores.items() if k.endswith("jaccard")}
    return {**figures, "threshold": str(THRESHOLD), "training_data": origin, "size": str(size)}


def load_run(run: Path, device: torch.device) -> tuple[TrainConfig, nn.Module]:
    """The configuration of a finished run, and its averaged network as it was at the end.

    The network is in evaluation mode.

    Raises:
        ConfigError: the folder holds no finished run, or its files are damaged.
    """
    try:
        values = yaml.safe_load((run / "config.yaml").read_text())
        state = torch.load(run / "last.pt", map_location=device, weights_only=True)
    except OSError as error:
        raise ConfigError(f"{run} holds no run of model.train: {error}") from error
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        raise ConfigError(f"{run} holds no readable run of model.train: {error}") from error
    config = parse_config(values)
    progress = state["progress"]
    if progress["epoch"] < config.epochs and not progress.get("stopped"):
        raise ConfigError(f"{run} is not finished: resume it first")
    network = new_network(config)
    network.load_state_dict(state["average"])
    return config, network.to(device).eval()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
