r"""Compare training recipes on images that their runs held out.

    python -m model.compare --recipe exact runs/exact-0 runs/exact-1 \
        --recipe pooled runs/pooled-0 runs/pooled-1

Each recipe is a name and its finished runs (`model.train` with `data.folds`), one or more a fold.
Every run's network at its end is scored on the photos that the run held out, and on the validation
set, at the masks' own sizes. Recipes are compared with the first one, photo by photo: the mean of
the differences and its standard error over photos. Where several runs scored one photo, their mean
counts.

The last columns say whether the position attention at half resolution is used: its weights η
(eq. 4), and what the Jaccard loses when it is left out of the trained network.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.program import Help
from model.checkpoint import load_run, split_again
from model.config import ConfigError
from model.data import Sample, add_data_arguments, find_samples
from model.evaluate import evaluate, torch_network
from model.generator import Generator
from model.metrics import jaccard
from model.truth import DataError

Scores = dict[str, list[float]]
"""Values of the Jaccard by photo id: one for each run that scored the photo."""


@dataclass
class Recipe:
    """The scores of one recipe's runs."""

    name: str
    scores: dict[str, Scores] = field(default_factory=dict)
    """Scores by set: `holdout` and, where there is one, `validation`."""
    without: dict[str, Scores] = field(default_factory=dict)
    """Scores without the half-resolution attention; empty where the network has none."""
    eta: list[float] = field(default_factory=list)
    """Values of η: one for every half-resolution attention of every run."""


def score(name: str, runs: Sequence[Path], samples: list[Sample], cache: Path) -> Recipe:
    """Score the runs of one recipe.

    Raises:
        ConfigError: a folder holds no finished run of the generator, or a run held out no fold, or
            was trained on what is held out today.
        DataError: a photo or mask cannot be used.
    """
    recipe = Recipe(name)
    for folder in runs:
        print(f"{name}: {folder}", file=sys.stderr, flush=True)
        run = load_run(folder, torch.device("cpu"))
        config, network = run.config, run.network
        if not isinstance(network, Generator) or not config.data.folds:
            raise ConfigError(f"{folder} is no run of slsnet that held out a fold: set data.folds")
        attentions = [pam for pam in network.half_resolution_attention() if pam.eta.item()]
        recipe.eta += [pam.eta.item() for pam in attentions]
        for which, photos in split_again(run, samples, cache)[1].items():
            scored = _jaccard(folder, network, config.size, photos)
            _add(recipe.scores.setdefault(which, defaultdict(list)), photos, scored)
            if attentions:
                for pam in attentions:
                    pam.mode = "asleep"
                scored = _jaccard(folder, network, config.size, photos)
                for pam in attentions:
                    pam.mode = "fused"
            _add(recipe.without.setdefault(which, defaultdict(list)), photos, scored)
    return recipe


def _jaccard(run: Path, network: nn.Module, size: int, photos: Sequence[Sample]) -> list[float]:
    found = evaluate(photos, torch_network(run, network, size, {})).confusion
    return [float(value) for value in jaccard(found)]


def _add(scores: Scores, photos: Sequence[Sample], values: Sequence[float]) -> None:
    for photo, value in zip(photos, values, strict=True):
        scores[photo.id].append(value)


def difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]
) -> NDArray[np.float64]:
    """Differences a - b, float64: one for each photo that both scored."""
    shared = [photo for photo in a if photo in b]
    return np.array([statistics.mean(a[photo]) - statistics.mean(b[photo]) for photo in shared])


def markdown(recipes: Sequence[Recipe]) -> str:
    """The comparison as Markdown: one table for each set."""
    first = recipes[0]
    lines: list[str] = []
    for which in first.scores:
        lines += [
            f"**{which}**",
            "",
            f"| recipe | photos | Jaccard | against {first.name}, paired | η at half resolution "
            "| without that attention |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for recipe in recipes:
            scores = recipe.scores.get(which, {})
            own = np.array([statistics.mean(values) for values in scores.values()])
            against = (
                "–" if recipe is first else _figure(difference(scores, first.scores[which]), "+")
            )
            eta = ", ".join(f"{value:+.3f}" for value in recipe.eta) or "–"
            lost = _figure(difference(recipe.without[which], scores), "+") if recipe.eta else "–"
            lines.append(
                f"| {recipe.name} | {len(own)} | {_figure(own)} | {against} | {eta} | {lost} |"
            )
        lines.append("")
    return "\n".join(lines)


def _figure(values: NDArray[np.float64], sign: str = "") -> str:
    """The mean of the values and its standard error over photos, as text."""
    if not len(values):
        return "–"
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():{sign}.4f} ± {error:.4f}"


def main(argv: list[str] | None = None) -> None:
    """Compare, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m model.compare",
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--recipe",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "RUN"),
        help="a name and its runs' folders; once for each recipe",
    )
    args = parser.parse_args(argv)
    try:
        samples = find_samples(args.data)
        recipes = []
        for name, *runs in args.recipe:
            if not runs:
                raise ConfigError(f"--recipe {name} names no run: give its folders after the name")
            recipes.append(score(name, [Path(run) for run in runs], samples, args.cache))
    except (ConfigError, DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(markdown(recipes))


if __name__ == "__main__":
    main()
