"""The tables and plots of `benchmarks.zoo`, from what it measured."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.tables import markdown

__all__ = [
    "BATCHES",
    "CLIENTS",
    "PAPER_MS",
    "SIDES",
    "Results",
    "front",
    "paper_table",
    "plot",
    "read",
    "rows",
    "sides_table",
    "table",
]

BATCHES = (1, 8)
CLIENTS = 8

SIDES = (64, 128, 256)

PAPER: dict[str, tuple[float, float | None, float | None]] = {
    "slsnet": (2.35, 0.8198, 0.784),
    "fcn8s": (134.3, 0.7217, 0.747),
    "unet": (12.3, 0.6164, 0.544),
    "segnet": (11.5, 0.6963, 0.695),
    "frcn": (16.3, 0.7711, 0.746),
    "slsdeep": (46.65, 0.782, None),
    "segan": (382.17, 0.785, None),
    "enet": (0.36, 0.741, None),
    "gan-fcn": (10.61, None, 0.778),
}
"""What SLSNet's paper says, by network: million parameters, the Jaccard on ISBI 2017's test set
(table 1), and the threshold Jaccard on ISIC 2018's validation set (table 2)."""

PAPER_MS = {"slsnet": (5, 8, 14), "gan-fcn": (9, 14, 21)}
"""Milliseconds an image at `SIDES` on a GTX 1080 Ti, by table 3 of SLSNet's paper."""


_SCORES = ("jaccard", "jaccard_standard_error", "threshold_jaccard", "budget")
_FACTS = ("parameters", "macs", "bytes", "memory_mb", "ms")


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A file of figures that this benchmark wrote.

    Args:
        keys: that it has at least.

    Raises:
        ValueError: it is not there, is no JSON, or lacks one of `keys`; the message names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: measure it first") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, remove it and measure anew: {error}") from error
    if not isinstance(values, dict) or (missing := [key for key in keys if key not in values]):
        lacks = repr(missing[0]) if isinstance(values, dict) else "its figures"
        raise ValueError(f"{path} lacks {lacks}: remove it and measure anew")
    return values


@dataclass(frozen=True)
class Results:
    """What one budget gave, in its folder."""

    out: Path

    def run(self, name: str, seed: int) -> Path:
        """The folder of a training."""
        return self.out / "runs" / name / f"seed-{seed}"

    def graph(self, name: str, side: int | None = None) -> Path:
        """The exported network; for images of another side, in pixels, if one is named."""
        return self.out / "graphs" / (f"{name}-{side}.onnx" if side else f"{name}.onnx")

    def scores(self, name: str) -> Iterator[dict[str, Any]]:
        """What each finished training of a network reached."""
        for path in sorted((self.out / "runs" / name).glob("seed-*/score.json")):
            yield read(path, *_SCORES)

    def scored(self) -> set[str]:
        """The networks that have a finished training."""
        return {path.parts[-3] for path in self.out.glob("runs/*/seed-*/score.json")}

    @property
    def costs(self) -> Path:
        """Parameters, milliseconds, memory and photos a second of each network, as JSON."""
        return self.out / "costs.json"

    @property
    def sides(self) -> Path:
        """Milliseconds of some networks at other sides of the image, as JSON."""
        return self.out / "sides.json"


@dataclass(frozen=True)
class Row:
    """What is known of a network."""

    name: str
    costs: dict[str, Any]
    jaccard: float | None
    """Mean over seeds."""
    error: float | None
    """Its standard error over the images."""
    seeds: int
    threshold_jaccard: float | None
    """Mean over seeds."""
    fold: tuple[float, float, int] | None
    """Mean Jaccard over the photos that its trainings held out, standard error, and how many."""


def rows(results: Results) -> tuple[dict[str, Any], list[Row], str | None]:
    """All figures: what they were measured on, a row a network, and the budget of the trainings.

    Raises:
        ValueError: trainings of different budgets lie in this folder, or a file of figures is
            missing or broken.
    """
    costs = read(results.costs, "networks")
    found, budgets = [], set()
    for name, facts in costs["networks"].items():
        if missing := [key for key in _FACTS if key not in facts]:
            raise ValueError(f"{results.costs} lacks {missing[0]!r} of {name}: measure it anew")
        scores = list(results.scores(name))
        budgets |= {score["budget"] for score in scores}
        found.append(
            Row(
                name,
                facts,
                statistics.mean(score["jaccard"] for score in scores) if scores else None,
                max(score["jaccard_standard_error"] for score in scores) if scores else None,
                len(scores),
                statistics.mean(score["threshold_jaccard"] for score in scores) if scores else None,
                _over_folds([score["fold"] for score in scores if "fold" in score]),
            )
        )
    if len(budgets) > 1:
        different = "; ".join(sorted(budgets))
        raise ValueError(f"{results.out} has trainings of several budgets: {different}")
    return costs, found, next(iter(budgets), None)


def _over_folds(folds: list[dict[str, Any]]) -> tuple[float, float, int] | None:
    """The mean over all photos, its standard error, and their number; each fold counts once."""
    distinct = list({fold["fold"]: fold for fold in folds}.values())
    count = sum(fold["count"] for fold in distinct)
    if not count:
        return None
    shares = [fold["count"] / count for fold in distinct]
    mean = sum(share * fold["jaccard"] for share, fold in zip(shares, distinct, strict=True))
    errors = [
        share * fold["jaccard_standard_error"] for share, fold in zip(shares, distinct, strict=True)
    ]
    return mean, math.hypot(*errors), count


def _accuracy(row: Row) -> float:
    return -1 if row.jaccard is None else row.jaccard


def table(costs: dict[str, Any], found: list[Row], budget: str | None) -> str:
    """The table as Markdown, the most accurate network first; arguments are what `rows` returns."""
    threads = costs["threads"]
    lines = [
        f"Machine: {costs['machine']}. Budget of a training: {budget or 'none'}."
        f" Milliseconds an image in ONNX Runtime, photos a second of {CLIENTS} clients through the"
        " server; medians.",
        "",
        "| network | Jaccard, validation | held-out folds | seeds | parameters, M | GMAC"
        f" | file, MB | memory, MB | 1 thread: 1 | of 8 | {threads} threads: 1 | of 8 | photos/s |",
        "|---|" + "--:|" * 12,
    ]
    best_first = sorted(found, key=_accuracy, reverse=True)
    for row in best_first:
        facts = row.costs
        score = "–" if row.jaccard is None else f"{row.jaccard:.4f} ± {row.error:.4f}"
        fold = "{:.4f} ± {:.4f} of {}".format(*row.fold) if row.fold else "–"
        times = " | ".join(
            f"{facts['ms'][f'{count}x{size}']:.1f}" for count in (1, threads) for size in BATCHES
        )
        lines.append(
            f"| `{row.name}` | {score} | {fold} | {row.seeds or '–'}"
            f" | {facts['parameters'] / 1e6:.2f} | {facts['macs'] / 1e9:.2f}"
            f" | {facts['bytes'] / 1e6:.1f} | {facts['memory_mb']:.0f}"
            f" | {times} | {_cell(facts.get('photos_per_s'), '.1f')} |"
        )
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def paper_table(of_networks: list[Row]) -> str:
    """The paper's tables 1 and 2 beside the figures of here, as Markdown."""
    found = {row.name: row for row in of_networks}

    return markdown(
        (
            *("network", "parameters, M: paper", "here", "Jaccard: paper, test 2017"),
            *("here, validation 2017", "threshold Jaccard: paper, validation 2018"),
            "here, validation 2017",
        ),
        [
            (
                *(f"`{name}`", f"{parameters:.2f}", f"{row.costs['parameters'] / 1e6:.2f}"),
                *(_cell(jaccard, ".3f"), _cell(row.jaccard, ".3f")),
                *(_cell(threshold, ".3f"), _cell(row.threshold_jaccard, ".3f")),
            )
            for name, (parameters, jaccard, threshold) in PAPER.items()
            if (row := found.get(name))
        ],
    )


def sides_table(results: Results) -> str:
    """The paper's table 3 beside the times of here, as Markdown."""
    measured = read(results.sides, "sides", "networks")
    heads = [f"{side}×{side}" for side in measured["sides"]]
    lines = []
    for name, by_threads in measured["networks"].items():
        if name in PAPER_MS:
            of_paper = dict(zip(SIDES, PAPER_MS[name], strict=True))
            times = (str(of_paper.get(side, "–")) for side in measured["sides"])
            lines.append((f"`{name}`", "paper, GTX 1080 Ti", *times))
        for threads, milliseconds in by_threads.items():
            times = (f"{ms:.1f}" for ms in milliseconds)
            lines.append((f"`{name}`", f"here, threads: {threads}", *times))
    return markdown(("network, ms an image", "on", *heads), lines)


def plot(found: list[Row]) -> Figure:
    """Accuracy against time, parameters and bytes; the line joins what nothing is better than."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    scored = [row for row in found if row.jaccard is not None]
    costs = (
        ("ms an image, one thread", [row.costs["ms"]["1x1"] for row in scored]),
        ("parameters, M", [row.costs["parameters"] / 1e6 for row in scored]),
        ("file, MB", [row.costs["bytes"] / 1e6 for row in scored]),
    )
    for axis, (label, values) in zip(axes, costs, strict=True):
        points = [(x, row.jaccard or 0.0) for x, row in zip(values, scored, strict=True)]
        axis.plot(*zip(*front(points), strict=True), color="#a0aec0", zorder=1)
        before, is_below = (0.0, 0.0), False
        for (x, y), row in sorted(zip(points, scored, strict=True), key=lambda one: one[0]):
            axis.errorbar(x, y, row.error, fmt="o", color="#2b6cb0", capsize=3)
            # Names of neighbours would cover each other.
            is_near = x < 2 * before[0] and abs(y - before[1]) < 0.01
            before, is_below = (x, y), is_near and not is_below
            place = (5, -11 if is_below else 5)
            axis.annotate(row.name, (x, y), xytext=place, textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,))
        )
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Jaccard, validation")
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is both cheaper (first) and better (second) than, by cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or value > kept[-1][1]:
            kept.append((cost, value))
    return kept
