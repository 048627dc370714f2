"""The training and selection images of a run: samples by split and fold, and their pixels."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.progress import say
from model import duplicates
from model.config import DataConfig, TrainConfig
from model.data import (
    PixelSet,
    Sample,
    Split,
    find_samples,
    hold_out,
    load_pixels,
    read_groups,
    refuse_leakage,
    select,
)
from model.truth import DataError

STORED_SIZE = 256  # side at which the set is kept, pixels; augmentation warps it, then pools


def prepare(
    config: TrainConfig, data: Path, cache: Path
) -> tuple[PixelSet, dict[str, PixelSet], str]:
    """Find, split, check and decode a run's images: training pixels, named selection sets, origin.

    Raises:
        DataError: a file or id cannot be used; the message names it.
    """
    samples = find_samples(data)
    training, selections = split_samples(config, samples, cache)
    decoded = _decode(config.data, _side(config), samples, "training", cache)
    counts = Counter(sample.origin for sample in training)
    origin = ", ".join(f"{count} images of {name}" for name, count in sorted(counts.items()))
    pixels = {
        name: _decode(config.data, _side(config), samples, "validation", cache)
        if name == "validation"
        else decoded.of(chosen)
        for name, chosen in selections.items()
    }
    return decoded.of(training), pixels, origin


def split_samples(
    config: TrainConfig, samples: list[Sample], cache: Path
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Split the samples into training samples and named selection sets.

    Copies of a photo are in one fold, and so are the photos of one group of `config.data.groups`.
    Training photos that belong together with a validation or test photo are left out. Both are
    printed, once for all folds.

    Raises:
        DataError: there is nothing to train on or to select by, an id is in two splits, or a file
            cannot be used.
    """
    # Between data sets ids repeat, and `select` sorts that out. Within one they are a mistake.
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
    # The search for copies takes seconds, and is the same for every fold and teacher.
    every_fold = dataclasses.replace(config.data, folds=0, fold=0, teacher=None, teachers=())
    training = list(_grouped(every_fold, _side(config), tuple(samples), cache))
    selections = {"validation": validation} if validation else {}
    if folds := config.data.folds:
        count = len(training)
        training, held = hold_out(training, config.data.fold, folds)
        if not training or not held:
            raise DataError(
                f"fold {config.data.fold} of {folds} holds {'all' if held else 'none'} of the "
                f"{count} training photos: set fewer data.folds, or another data.fold"
            )
        selections["holdout"] = held
    elif not training:
        raise DataError("there are no training photos beside those of validation and test sets")
    refuse_leakage({"the training set": training, **selections})
    return training, selections


def _side(config: TrainConfig) -> int:
    """The side at which the images of a run are kept: a multiple of its input's."""
    return math.ceil(STORED_SIZE / config.size) * config.size


def _decode(
    data: DataConfig, side: int, samples: Sequence[Sample], split: Split, cache: Path
) -> PixelSet:
    """Decode a whole split, even if only a part is used, so that every fold finds it cached."""
    # Nothing is learnt from a mask of the test set.
    uniform = data.allow_uniform_masks or split == "test"
    return load_pixels(select(samples, split), side, cache, uniform)


@functools.lru_cache(maxsize=1)
def _grouped(
    data: DataConfig, side: int, samples: tuple[Sample, ...], cache: Path
) -> tuple[Sample, ...]:
    """Give the training samples their groups; leave out those that belong with held-out photos."""
    order: tuple[Split, ...] = ("training", "validation", "test")
    every = [sample for split in order for sample in select(samples, split)]
    decoded = (_decode(data, side, samples, split, cache) for split in order)
    images = (image for pixels in decoded for image in pixels.images)
    labels: dict[str, str] = {}
    if data.groups is not None:
        labels = read_groups(Path(data.groups), data.group_column)
        alone = sum(sample.id not in labels for sample in every)
        if alone == len(every):
            raise DataError(f"data.groups: {data.groups} holds none of the ids of the data")
        say(f"{alone} of {len(every)} photos have no {data.group_column}")
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
    kept = tuple(sample for sample in training if sample.group not in outside)
    why = f"or of one {data.group_column} " if labels else ""
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
    """Print the ids that are treated so, each with the id that causes it."""
    if pairs:
        more = ", …" if len(pairs) > 5 else ""
        shown = ", ".join(f"{one} = {other}" for one, other in pairs[:5])
        say(f"{what} ({len(pairs)}): {shown}{more}")
