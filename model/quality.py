"""How much a network's masks can be trusted: its table of quality is made here, and tested.

    python -m model.quality calibrate --runs runs/fold-? --weights model/weights/slsnet.safetensors
    python -m model.quality report --images DIR --masks DIR --plot risk.svg

`calibrate` writes `X.quality.json` beside the weights `X.safetensors`, from the photos that runs of
the same recipe held out (`model.train` with `data.folds`): a network knows the photos that it was
trained on too well. The server reads that table (`photos.quality`). `report` says on other photos
how well the quality tells good masks from bad ones.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from common.program import Help, program
from model.commands import run_command
from model.data import (
    add_data_arguments,
    add_held_out_argument,
    add_pair_arguments,
    find_pairs,
    find_samples,
)
from model.evaluate import WEIGHTS, Case, Evaluation, add_model_argument, evaluate, load_network
from model.metrics import THRESHOLD_JACCARD, jaccard
from model.truth import DataError, read_truth
from photos.image import THRESHOLD, upsampled
from photos.quality import QualityTable, expected_jaccard

Values = NDArray[np.float64]

BINS = 12
"""Parts of the photos, sorted by their expected Jaccard. Each gives a row."""

SHARE = 0.8
"""Part of an annotator's outline that is to lie between the tight and the generous one."""

COVERAGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Shares of the photos, the surest first, that a report shows."""

_REPORT_BINS = 5
"""Parts of equal size that the calibration error is taken over: with more of them there would be
so few photos in each that chance alone makes an error."""

_RESAMPLES = 1000


@dataclass(frozen=True)
class HeldOut:
    """What is known of photos that the network which segmented them had not seen."""

    expected: Values
    """`photos.quality.expected_jaccard` of each mask."""
    jaccard: Values
    """Its true Jaccard."""
    border: list[NDArray[np.float32]]
    """What the network says along the annotator's outline, for each photo with one."""


def held_out(evaluations: Iterable[Evaluation]) -> HeldOut:
    """Gather what the table is made of from networks' answers on photos that they held out."""
    expected: list[float] = []
    figures: list[Values] = []
    border: list[NDArray[np.float32]] = []
    for evaluation in evaluations:
        expected += [_expected(case, evaluation.threshold) for case in evaluation.cases]
        figures.append(jaccard(evaluation.confusion))
        along = (along_outline(c.probability, read_truth(c.sample.mask)) for c in evaluation.cases)
        border += [values for values in along if values.size]
    return HeldOut(np.array(expected), np.concatenate(figures), border)


def make_table(held: HeldOut, weights_sha256: str) -> QualityTable:
    """The table of a network.

    Args:
        held: photos that the network, or others of the same recipe, had not seen.
        weights_sha256: digest of the network's weights.

    Raises:
        DataError: there are too few photos.
    """
    if len(held.expected) < 2 * BINS or not held.border:
        raise DataError(
            f"{len(held.expected)} photos make no table of quality: hold out {2 * BINS} or more"
        )
    parts = np.array_split(np.argsort(held.expected, kind="stable"), BINS)
    means = np.array([held.jaccard[part].mean() for part in parts])
    rising = isotonic(means, np.array([len(part) for part in parts], float))
    # Of equal weight for every photo, however long its outline is.
    even = np.linspace(0.005, 0.995, 100)
    pooled = np.concatenate([np.quantile(along, even) for along in held.border])
    generous, tight = np.quantile(pooled, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    # A mask without lesion is as wrong as can be: every photo is of one.
    x = [0.0, *(float(held.expected[part].mean()) for part in parts)]
    return QualityTable(
        weights_sha256,
        len(held.expected),
        tuple(round(value, 4) for value in x),
        tuple(round(value, 4) for value in (0.0, *rising.tolist())),
        SHARE,
        round(float(generous), 4),
        round(float(tight), 4),
    )


def isotonic(values: Values, weights: Values) -> Values:
    """The rising row that is nearest to `values` by weighted squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, mass, count = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def along_outline(
    probability: NDArray[np.float32], truth: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """What the network says where lesion and skin meet in a true mask, float32 [points].

    Args:
        probability: float32 [rows, columns].
        truth: bool [height, width], of any size; the frame's edge is no outline.
    """
    height, width = truth.shape
    (full,) = upsampled(probability, width, height, height)
    across, down = truth[1:] != truth[:-1], truth[:, 1:] != truth[:, :-1]
    both = np.concatenate(
        [(full[1:] + full[:-1])[across], (full[:, 1:] + full[:, :-1])[down]], dtype=np.float32
    )
    return both / np.float32(2)


def spearman(a: Values, b: Values) -> float:
    """Spearman's rank correlation; ties share their mean rank."""
    x, y = _ranks(a), _ranks(b)
    x -= x.mean()
    y -= y.mean()
    return float(np.dot(x, y) / max(float(np.sqrt(np.dot(x, x) * np.dot(y, y))), 1e-12))


def auc(score: Values, positive: NDArray[np.bool_]) -> float:
    """How often a positive has a higher score than a negative (ties: half); NaN without both."""
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return math.nan
    above = _ranks(score)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * others))


def calibration_error(score: Values, truth: Values, bins: int = _REPORT_BINS) -> float:
    """The mean gap between score and truth over parts of equal size, sorted by score."""
    parts = np.array_split(np.argsort(score, kind="stable"), bins)
    gaps = [len(part) * abs(score[part].mean() - truth[part].mean()) for part in parts if len(part)]
    return float(sum(gaps) / len(score))


def _ranks(values: Values) -> Values:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where], np.float64)


def _expected(case: Case, threshold: float) -> float:
    return expected_jaccard(case.probability, case.probability > threshold)


def report(evaluation: Evaluation, table: QualityTable) -> str:
    """The figures of a table on photos that it was not made of, as Markdown."""
    expected = np.array([_expected(case, evaluation.threshold) for case in evaluation.cases])
    score = np.array([table.likely(value) for value in expected])
    truth = jaccard(evaluation.confusion)
    low = truth < THRESHOLD_JACCARD
    lines = ["| figure | value | standard error |", "|---|--:|--:|"]
    figures: dict[str, Callable[[NDArray[np.intp]], float]] = {
        "Spearman with the true Jaccard": lambda rows: spearman(expected[rows], truth[rows]),
        "AUC for a Jaccard below 0.65": lambda rows: auc(-expected[rows], low[rows]),
        "calibration error": lambda rows: calibration_error(score[rows], truth[rows]),
        "mean quality − mean Jaccard": lambda rows: float((score[rows] - truth[rows]).mean()),
        "Jaccard of the surest 80 %": lambda rows: _surest(expected[rows], truth[rows], 0.8),
    }
    for name, figure in figures.items():
        rng = np.random.default_rng(0)
        every = np.arange(len(truth))
        drawn = [figure(rng.choice(every, len(every))) for _ in range(_RESAMPLES)]
        # Where no mask is so bad, there is nothing to find.
        error = np.std([value for value in drawn if math.isfinite(value)] or [math.nan])
        lines.append(f"| {name} | {figure(every):.3f} | {error:.3f} |")
    lines += _coverage(expected, truth) + _borders(evaluation, table)
    spent = time.process_time()
    for case in evaluation.cases:
        table.quality(case.probability, case.probability > evaluation.threshold)
    ms = 1000 * (time.process_time() - spent) / len(evaluation.cases)
    return "\n".join(
        [*lines, "", f"{len(truth)} photos; the score takes {ms:.3f} ms of a core for each mask."]
    )


def _surest(score: Values, truth: Values, coverage: float) -> float:
    kept = np.argsort(-score, kind="stable")[: max(1, round(coverage * len(score)))]
    return float(truth[kept].mean())


def _coverage(score: Values, truth: Values) -> list[str]:
    lines = [
        "",
        "| kept, the surest | mean Jaccard | below 0.65 among them | found among those sent on |",
        "|--:|--:|--:|--:|",
    ]
    order = np.argsort(-score, kind="stable")
    low = truth < THRESHOLD_JACCARD
    for coverage in COVERAGES:
        count = max(1, round(coverage * len(order)))
        kept, sent = order[:count], order[count:]
        lines.append(
            f"| {coverage:.0%} | {truth[kept].mean():.3f} | {low[kept].sum()} |"
            f" {low[sent].sum()} of {low.sum()} |"
        )
    return lines


def _borders(evaluation: Evaluation, table: QualityTable) -> list[str]:
    shares, between = [], []
    for case in evaluation.cases:
        truth = read_truth(case.sample.mask)
        along = along_outline(case.probability, truth)
        if along.size:
            shares.append(np.mean((along > table.generous) & (along <= table.tight)))
        height, width = truth.shape
        (full,) = upsampled(case.probability, width, height, height)
        areas = (full > table.tight).sum(), truth.sum(), (full > table.generous).sum()
        between.append(areas[0] <= areas[1] <= areas[2])
    return [
        "",
        f"Between the tight outline ({table.tight:g}) and the generous one ({table.generous:g}) lie"
        f" {np.mean(shares):.1%} of an annotator's outline; {np.mean(between):.1%} of annotators'"
        " areas are between theirs.",
    ]


def draw(evaluation: Evaluation, path: Path) -> None:
    """The risk-coverage curve as a picture: mean Jaccard of the surest masks, by their share."""
    from matplotlib.figure import Figure

    expected = np.array([_expected(case, evaluation.threshold) for case in evaluation.cases])
    truth = jaccard(evaluation.confusion)
    share = np.arange(1, len(truth) + 1) / len(truth)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for name, score, style in (
        ("sorted by quality", expected, "-"),
        ("sorted by the truth: the best there could be", truth, ":"),
    ):
        sorted_truth = truth[np.argsort(-score, kind="stable")]
        axes.plot(share, np.cumsum(sorted_truth) / np.arange(1, len(truth) + 1), style, label=name)
    axes.axhline(truth.mean(), color="#718096", linestyle="--", linewidth=1, label="in any order")
    axes.set(xlim=(0, 1), xlabel="share of the photos that is kept", ylabel="mean Jaccard of them")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _calibrate(options: argparse.Namespace) -> str:
    import torch

    from model.checkpoint import load_run, split_again
    from model.config import ConfigError
    from model.evaluate import torch_network

    digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    samples = find_samples(options.data)
    evaluations = []
    for folder in options.runs:
        run = load_run(folder, torch.device("cpu"))
        if "holdout" not in (sets := split_again(run, samples, options.cache)[1]):
            raise ConfigError(f"{folder} held nothing out: train it with data.folds")
        network = torch_network(folder, run.network, run.config.size, {})
        found = evaluate(sets["holdout"], network)
        evaluations.append(found)
        scores = jaccard(found.confusion)
        print(f"{folder}: {len(scores)} photos, Jaccard {scores.mean():.4f}", file=sys.stderr)
    table = make_table(held_out(evaluations), digest)
    output = options.output or options.weights.with_suffix(".quality.json")
    write_atomically(output, table.document())
    return f"{output}: from {table.photos} held-out masks"


def _report(options: argparse.Namespace) -> str:
    path = options.table or options.model.with_suffix(".quality.json")
    table = QualityTable.parse(path.read_bytes())
    network = load_network(options.model)
    samples = find_pairs(options.images, options.masks)
    evaluation = evaluate(samples, network, THRESHOLD, progress=True)
    if options.plot:
        draw(evaluation, options.plot)
    return report(evaluation, table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("model.quality"), description=__doc__, formatter_class=Help
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser(
        "calibrate", formatter_class=Help, help="make a table from what runs held out"
    )
    add_data_arguments(make)
    add_held_out_argument(make)
    make.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS.with_suffix(".safetensors"),
        metavar="FILE",
        help="the table is for these (default: the shipped ones)",
    )
    make.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the table (default: beside the weights, .quality.json)",
    )
    make.set_defaults(run=_calibrate)
    test = commands.add_parser("report", formatter_class=Help, help="test a table on other photos")
    add_pair_arguments(test)
    add_model_argument(test)
    test.add_argument(
        "--table", type=Path, metavar="FILE", help="the one to test (default: beside the network)"
    )
    test.add_argument("--plot", type=Path, metavar="FILE", help="the risk-coverage curve, .svg")
    test.set_defaults(run=_report)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a table, or test one."""
    run_command(_parser(), arguments)


if __name__ == "__main__":
    main()
