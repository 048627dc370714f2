"""The folder of a run: its files are written and read here; one that does not fit is refused."""

import csv
import fcntl
import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from common.files import remove_unfinished, replacing
from model.config import ConfigError, TrainConfig, config_dict, parse_config, with_absolute_paths
from model.data import Sample
from model.networks import new_network, save_network
from model.splits import split_samples
from model.trainer import RunProgress, Trainer, TrainingError
from photos.image import THRESHOLD

_STATES = ("network", "average", "discriminator", "optimizer", "discriminator_optimizer")


@dataclass(frozen=True)
class Run:
    """A finished run of `model.train`."""

    folder: Path
    config: TrainConfig
    network: nn.Module
    """The averaged network as it was at the end, in evaluation mode."""
    ids: frozenset[str]
    """The images that it was trained on."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other processes from training in the folder `out`; a killed one keeps nobody out.

    What killed ones were writing is removed: a checkpoint has 100 MB.

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
        else:
            for name in ("last.pt", "best.safetensors", "history.csv", "config.yaml"):
                remove_unfinished(out / name)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(file: Path) -> Iterator[Path]:
    """`replacing`, for what PyTorch or safetensors write; they have errors of their own.

    Raises:
        TrainingError: they cannot write, as on a full disk.
    """
    try:
        with replacing(file) as path:
            yield path
    except (RuntimeError, SafetensorError) as error:
        why = str(error).partition("\n")[0]
        raise TrainingError(f"{file} cannot be written and stays as it was: {why}") from error


def save(trainer: Trainer) -> None:
    """Write `last.pt` and `history.csv`, each atomically.

    Raises:
        TrainingError: `last.pt` cannot be written.
    """
    progress = trainer.progress
    state = {
        "config": config_dict(trainer.config),
        "ids": trainer.ids,
        "taught_by": trainer.taught_by,
        "progress": vars(progress),
        **{name: getattr(trainer, name).state_dict() for name in _STATES},
    }
    with writing(trainer.out / "last.pt") as path:
        torch.save(state, path)
    write_history(trainer)


def write_history(trainer: Trainer) -> None:
    """Write `history.csv` atomically, once there is an epoch to tell of that it lacks."""
    progress = trainer.progress
    if not progress.history:
        return
    columns = list(dict.fromkeys(k for row in progress.history for k in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(progress.history)
    content = text.getvalue().encode()
    file = trainer.out / "history.csv"
    if not file.is_file() or file.read_bytes() != content:
        with replacing(file) as path:
            path.write_bytes(content)


def load(trainer: Trainer) -> None:
    """Continue from the checkpoint `last.pt`.

    Raises:
        TrainingError: there is no checkpoint, or it is unreadable.
        ConfigError: the checkpoint belongs to another configuration, architecture or training set.
    """
    path = trainer.out / "last.pt"
    try:
        state = _read(path, trainer.device)
    except FileNotFoundError as error:
        raise TrainingError(
            f"nothing to resume: {path} does not exist; start the run without --resume"
        ) from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint: {error}") from error
    ours = _flat(config_dict(with_absolute_paths(trainer.config)))
    theirs = _flat(config_dict(with_absolute_paths(state["config"])))
    if changed := [k for k in theirs | ours if theirs.get(k) != ours.get(k)]:
        raise ConfigError(
            f"{path} was made with {changed[0]}={theirs.get(changed[0])}, "
            f"not {ours.get(changed[0])}: "
            "resume with the run's own configuration, or start another run"
        )
    if state["ids"] != trainer.ids:
        raise ConfigError(f"{path} was made from another training set: pass the same --data")
    try:
        for name in _STATES:
            getattr(trainer, name).load_state_dict(state[name])
    except Exception as error:  # optimisers raise whatever comes of a state that is not theirs
        raise ConfigError(f"{path} holds another architecture: {error}") from error
    trainer.progress, trainer.taught_by = state["progress"], state["taught_by"]


def save_best(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Write the averaged weights as `best.safetensors`, with the scores of `row`.

    Raises:
        TrainingError: the file cannot be written.
    """
    figures = weights_metadata(row, trainer.origin, trainer.config.size)
    with writing(trainer.out / "best.safetensors") as path:
        save_network(trainer.average, path, figures)


def weights_metadata(scores: Mapping[str, float], origin: str, size: int) -> dict[str, str]:
    """Metadata for a file of weights: the scores (`score_selections`), `origin`, input side."""
    figures = {k: f"{v:.4f}" for k, v in scores.items() if k.endswith("jaccard")}
    return {**figures, "threshold": str(THRESHOLD), "training_data": origin, "size": str(size)}


def load_run(run: Path, device: torch.device) -> Run:
    """Read a finished run from its folder.

    Raises:
        ConfigError: the folder holds no finished run, or its files are damaged.
    """
    try:
        state = _read(run / "last.pt", device)
    except OSError as error:
        raise ConfigError(f"{run} holds no run of model.train: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{run} holds no readable run of model.train: {error}") from error
    config: TrainConfig = state["config"]
    if not state["progress"].is_over(config.epochs):
        raise ConfigError(f"{run} is not finished: resume it first")
    try:
        network = new_network(config)
        network.load_state_dict(state["average"])
    except (ConfigError, RuntimeError) as error:
        raise ConfigError(f"{run}: its weights do not fit its configuration: {error}") from error
    return Run(run, config, network.to(device).eval(), frozenset(state["ids"]))


def split_again(
    run: Run, samples: list[Sample], cache: Path
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Split the samples as `run` would today: `split_samples` with the run's own configuration.

    Raises:
        ConfigError: the run was trained on a photo that is held out today.
        DataError: as for `split_samples`.
    """
    training, selections = split_samples(run.config, samples, cache)
    for photos in selections.values():
        refuse_seen(run.folder, run.ids, [photo.id for photo in photos])
    return training, selections


def refuse_seen(
    who: object,
    seen: Collection[str],
    held_out: Iterable[str],
    why: str = "this data holds out: the data or data.groups have changed since",
) -> None:
    """Refuse to judge photos by what was trained on them.

    Args:
        who: what was trained, for the message.
        seen: ids of the images that it was trained on.
        held_out: ids of the images that it must not know.
        why: ends the message: what holds them out, and the fix.

    Raises:
        ConfigError: an id is in both.
    """
    if both := set(seen) & set(held_out):
        raise ConfigError(f"{who} was trained on {min(both)}, which {why}")


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Read and check a checkpoint. Its configuration and progress become what they were.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is damaged or incomplete, or something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        raise ValueError(str(error)) from error
    try:
        progress = dict(state["progress"])
        progress.setdefault("stopped", False)  # the first runs did not stop early
        if missing := vars(RunProgress()).keys() - progress:
            raise ValueError(f"its progress lacks {min(missing)}")
        read: dict[str, Any] = {
            "config": parse_config(state["config"]),
            "progress": RunProgress(**progress),
            "ids": tuple(state["ids"]),
            "taught_by": state.get("taught_by"),  # the first runs did not keep it
            **{name: dict(state[name]) for name in _STATES},
        }
        finite = all(t.isfinite().all() for n in _STATES[:2] for t in read[n].values())
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"it is none of model.train: {error}") from error
    if not finite:
        raise ValueError("its weights are not finite")
    return read


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
