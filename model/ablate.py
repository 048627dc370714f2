"""Train presets side by side, several seeds each, and set the figures beside the paper's.

    python -m model.ablate --presets table4 --epochs 30 --seeds 0 1 2 --out runs/table4
    python -m model.ablate --presets paper cam-danet --epochs 30 --seeds 0 --out runs/cam
    python -m model.ablate --presets best --set ema_decay=0 --epochs 30 --out runs/no-average

Presets are those of model.config; table4, table5, table6 and cam stand for the paper's tables and
for the two forms of channel attention. `--epochs`, `--network` and `--set` hold for every run.
Finished runs are not repeated and a killed one goes on, so the same command fills what is missing.
`--out` receives one folder a run, `table.md`, `table.csv` (one row a run) and `plot.png`, rewritten
after every run.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
from matplotlib.figure import Figure

from common.files import replacing
from common.program import Help
from model.config import (
    PRESETS,
    ConfigError,
    TrainConfig,
    add_set_argument,
    load_config,
    parse_overrides,
)
from model.data import Sample, add_data_arguments, find_samples, select
from model.evaluate import evaluate, load_network
from model.loop import train
from model.names import add_network_argument
from model.splits import split_samples
from model.trainer import TrainingError
from model.truth import DataError
from photos.image import THRESHOLD

GROUPS = {
    "table4": ("base", "base+pam", "base+cam", "no-multiscale", "paper"),
    "table5": ("input-64", "paper", "input-256"),
    "table6": ("loss-bce", "loss-bce+l1", "loss-bce+jaccard", "paper"),
    "cam": ("paper", "cam-danet"),
}
MEASURES = ("accuracy", "dice", "jaccard", "sensitivity", "specificity")
# Percent, in the order of MEASURES: Sarker et al. 2019, tables 4 to 6, on the ISBI 2017 test set.
PAPER = {
    "base": (95.63, 83.61, 72.93, 79.42, 96.91),
    "base+pam": (96.72, 86.01, 75.96, 82.48, 98.40),
    "base+cam": (96.90, 87.23, 76.65, 83.31, 99.10),
    "no-multiscale": (97.25, 88.87, 78.76, 85.49, 99.59),
    "paper": (97.61, 90.63, 81.98, 87.81, 99.92),
    "input-64": (94.44, 87.59, 77.76, 84.16, 95.36),
    "input-256": (96.72, 89.72, 79.49, 86.36, 98.21),
    "loss-bce": (95.32, 85.11, 74.48, 83.71, 98.02),
    "loss-bce+l1": (96.90, 87.26, 76.80, 85.05, 99.30),
    "loss-bce+jaccard": (96.97, 89.56, 79.88, 86.90, 99.49),
}


@dataclass
class Row:
    """One preset and the figures of its runs, in percent, by seed."""

    preset: str
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    best_epoch: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def values(self, measure: str) -> list[float]:
        return [scores[measure] for scores in self.scores.values()]


def chosen(names: Sequence[str]) -> list[str]:
    """The presets that the names stand for, each once, in the order given.

    Raises:
        ConfigError: a name is neither a preset nor a group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in GROUPS and name not in PRESETS:
            known = ", ".join((*GROUPS, *PRESETS))
            raise ConfigError(f"no preset or group {name!r}; there are: {known}")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return list(found)


def held_out(
    config: TrainConfig, samples: list[Sample], split: str, cache: Path
) -> tuple[str, list[Sample]]:
    """The set that the runs are scored on: its name, and its images.

    Raises:
        DataError: there is no such set.
    """
    if split == "test":
        scored = select(samples, "test")
        if not scored:
            raise DataError("there is no official test set in the data: leave --split out")
        return split, scored
    return next(iter(split_samples(config, samples, cache)[1].items()))


def run_one(
    row: Row, config: TrainConfig, data: Path, out: Path, cache: Path, scored: list[Sample]
) -> None:
    """Train one run, or go on with it, and score its best weights at the masks' own sizes."""
    try:
        progress = train(config, data, out, cache, resume=(out / "last.pt").exists())
    except TrainingError as error:
        row.failed[config.seed] = str(error).partition(";")[0]
        return
    network = load_network(out / "best.safetensors", config.size)
    report = evaluate(scored, network).report()
    row.scores[config.seed] = {name: 100 * report[name] for name in MEASURES}
    row.best_epoch[config.seed] = progress.best_epoch


def markdown(rows: Sequence[Row], budget: str) -> str:
    """The table as Markdown: means ± standard deviations over seeds, beside the paper's figures."""
    lines = [
        "# Ablation",
        "",
        budget,
        "",
        "The paper's figures are for its own runs on the ISBI 2017 test set and stand here for",
        "comparison only: its Dice and Jaccard contradict each other (mean Dice ≤ 2J / (1 + J)).",
        "Percent; mean ± standard deviation over seeds.",
        "",
        "| preset | Jaccard, paper | **Jaccard** | Dice, paper | **Dice** | accuracy | sensitivity "
        "| specificity | seeds |",
        "|---|" + "---:|" * 8,
    ]
    for row in rows:
        paper = dict(zip(MEASURES, PAPER[row.preset], strict=True)) if row.preset in PAPER else {}
        printed = {m: f"{paper[m]:.2f}" if m in paper else "–" for m in MEASURES}
        found = {m: _mean(row.values(m)) for m in MEASURES}
        seeds = ", ".join(map(str, row.scores)) or "–"
        lines.append(
            f"| {row.preset} | {printed['jaccard']} | {found['jaccard']} | {printed['dice']} "
            f"| {found['dice']} | {found['accuracy']} | {found['sensitivity']} "
            f"| {found['specificity']} | {seeds} |"
        )
    failed = [(r.preset, seed, why) for r in rows for seed, why in r.failed.items()]
    if failed:
        lines += ["", "Runs that ended without a network:", ""]
        lines += [f"- {preset}, seed {seed}: {why}" for preset, seed, why in failed]
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the Jaccard of every run, the mean of every preset, and the paper's figure."""
    figure = Figure(figsize=(7, 0.55 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values = row.values("jaccard")
        axes.scatter(values, [place] * len(values), color="#2b6cb0", alpha=0.45, zorder=3)
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0
            axes.errorbar(
                statistics.mean(values), place, xerr=spread, fmt="D", color="#2b6cb0", capsize=4
            )
        if row.preset in PAPER:
            axes.plot(PAPER[row.preset][2], place, "x", color="#c05621", markersize=8)
    axes.plot([], [], "D", color="#2b6cb0", label="here: seeds, mean ± deviation")
    axes.plot([], [], "x", color="#c05621", label="the paper, ISBI 2017 test set")
    axes.set_yticks(range(len(rows)), [row.preset for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("Jaccard, %")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def write(rows: Sequence[Row], out: Path, budget: str) -> None:
    """Write `table.md`, `table.csv` and `plot.png`."""
    with replacing(out / "table.md") as path:
        path.write_text(markdown(rows, budget))
    with replacing(out / "table.csv") as path, path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["preset", "seed", "best_epoch", *MEASURES])
        for row in rows:
            for seed, scores in row.scores.items():
                figures = [f"{scores[m]:.4f}" for m in MEASURES]
                table.writerow([row.preset, seed, row.best_epoch[seed], *figures])
    with replacing(out / "plot.png") as path:
        plot(rows, path)


def ablate(
    names: Sequence[str],
    seeds: Sequence[int],
    overrides: dict[str, object],
    data: Path,
    out: Path,
    cache: Path,
    split: str = "validation",
) -> list[Row]:
    """Run every preset with every seed that is not finished in `out`, and write the tables.

    Raises:
        ConfigError: an unknown preset or key, or `out` holds runs of another budget.
        DataError: a file or id cannot be used; the message names it.
    """
    presets = chosen(names)
    if "seed" in overrides:
        raise ConfigError("--set seed is the same for every run: use --seeds")
    configs = {
        (preset, seed): load_config(preset, overrides={**overrides, "seed": seed})
        for preset in presets
        for seed in seeds
    }
    if any(config.network == "teacher" for config in configs.values()):
        raise ConfigError("network=teacher is not served, and so not scored: choose another")
    samples = find_samples(data)
    first = next(iter(configs.values()))
    which, scored = held_out(first, samples, split, cache)
    training, selections = split_samples(first, samples, cache)
    origins = ", ".join(sorted({s.origin for s in scored}))
    changes = ", ".join(f"{key}={value}" for key, value in overrides.items()) or "none"
    budget = (
        f"Budget: {_range([c.epochs for c in configs.values()])} epochs over {len(training)} "
        f"images, {len(seeds)} seed{'s' if len(seeds) > 1 else ''} a preset; changes to the "
        f"presets: {changes}. Scored: the best epoch's weights by {' and '.join(selections)} "
        f"Jaccard, on {len(scored)} {which} images ({origins}), at the masks' own sizes, "
        f"threshold {THRESHOLD}."
    )
    out.mkdir(parents=True, exist_ok=True)
    rows = {preset: Row(preset) for preset in presets}
    # One seed after another: an interrupted command has compared every preset.
    for seed in seeds:
        for preset in presets:
            print(f"{preset}, seed {seed}", file=sys.stderr, flush=True)
            folder = out / preset / f"seed-{seed}"
            run_one(rows[preset], configs[preset, seed], data, folder, cache, scored)
            write(list(rows.values()), out, budget)
    return list(rows.values())


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m model.ablate",
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--presets", nargs="+", required=True, metavar="NAME", help="presets, or tables of them"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run for each"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of every run, whatever --set says (default: each preset's own)",
    )
    add_network_argument(parser, "of every run, whatever --set says (default: each preset's own)")
    add_set_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of runs, table and plot"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="the official set on which the runs are scored",
    )
    args = parser.parse_args(argv)
    try:
        overrides = parse_overrides(args.set)
        named = {"network": args.network, "epochs": args.epochs}
        overrides |= {key: value for key, value in named.items() if value is not None}
        rows = ablate(
            args.presets, args.seeds, overrides, args.data, args.out, args.cache, args.split
        )
    except (ConfigError, DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print((args.out / "table.md").read_text())
    if any(row.failed for row in rows):
        parser.exit(1)


if __name__ == "__main__":
    main()
