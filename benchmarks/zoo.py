"""SLSNet beside the networks of the zoo, by one hand: `python -m benchmarks.zoo`.

    python -m benchmarks.zoo train --out build/zoo --epochs 2
    python -m benchmarks.zoo costs --out build/zoo
    python -m benchmarks.zoo report --out build/zoo

`train` gives every network the same photos, augmentation, loss, optimiser, number of epochs and
seeds, and scores it on the official validation set. What is done is not repeated and a killed run
goes on, so a budget can be spent in pieces. `costs` exports every network, with its trained weights
where there are any, and times all of them in rounds, each in a process of its own, as the server
runs it; then each in a server, which gets real photos. `report` writes `table.md` and `pareto.svg`.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu_engine import Contender, Figures, OtherWork, disturbance, measure
from benchmarks.latency import machine
from benchmarks.versions import Load, load_photos, send
from common.files import replacing
from common.program import Help
from model.config import TrainConfig, load_config, parse_overrides
from model.data import add_data_arguments, find_samples
from model.evaluate import evaluate, load_network
from model.export import export, set_attention
from model.generator import Generator
from model.layers import PositionAttention
from model.loop import train
from model.names import SERVED
from model.networks import new_network, read_network, save_network
from model.splits import split_samples
from photos.image import MODEL_SIZE
from server.cores import available_cores
from tests.support.launch import serve
from trt_build.samples import REFERENCE, load_samples

__all__ = ["main"]

BATCHES = (1, 8)
CLIENTS = 8

# SLSNet learns in the form that it is served in.
_OPTIONS: dict[str, dict[str, Any]] = {"slsnet": {"generator.pam_pool": [8, 1], "pam_wake": 0}}


def configuration(name: str, **changes: Any) -> TrainConfig:
    """The training of a network; `changes` to the preset are the same for all."""
    overrides = {"network": name, **_OPTIONS.get(name, {}), **changes}
    return load_config("quick", overrides=overrides)


@dataclass(frozen=True)
class Place:
    """Where the results of one budget are."""

    out: Path

    def run(self, name: str, seed: int) -> Path:
        """The folder of a training."""
        return self.out / "runs" / name / f"seed-{seed}"

    def graph(self, name: str) -> Path:
        """The exported network."""
        return self.out / "graphs" / f"{name}.onnx"

    def scores(self, name: str) -> Iterator[dict[str, Any]]:
        """What each finished training of a network reached."""
        for path in sorted((self.out / "runs" / name).glob("seed-*/score.json")):
            yield json.loads(path.read_text(encoding="utf-8"))

    @property
    def costs(self) -> Path:
        """What the networks cost."""
        return self.out / "costs.json"


def train_all(place: Place, args: argparse.Namespace) -> None:
    """Train and score what is not scored yet, one seed after another."""
    samples = find_samples(args.data)
    for seed in args.seeds:
        for name in args.networks:
            folder = place.run(name, seed)
            if (folder / "score.json").exists():
                continue
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            changes = parse_overrides(args.set)
            config = configuration(name, epochs=args.epochs, seed=seed, **changes)
            train(config, args.data, folder, args.cache, resume=(folder / "last.pt").exists())
            held_out = next(iter(split_samples(config, samples, args.cache)[1].values()))
            network = load_network(folder / "best.safetensors", config.size)
            report = evaluate(held_out, network).report()
            kept = ("jaccard", "jaccard_standard_error", "threshold_jaccard", "dice", "count")
            score = {key: report[key] for key in kept} | {"epochs": args.epochs, "seed": seed}
            _write(folder / "score.json", score)


def measure_all(place: Place, args: argparse.Namespace) -> None:
    """Export every network, and measure what it costs."""
    facts = {name: _exported(place, name) for name in args.networks}
    timed = _timed(place, args)
    rates = _served(place, args)
    for name in args.networks:
        facts[name] |= timed[name] | {"photos_per_s": rates[name]}
    _write(place.costs, {"machine": machine(), "threads": available_cores(), "networks": facts})


def _exported(place: Place, name: str) -> dict[str, Any]:
    """Write a network's graph; return parameters, multiplications and bytes."""
    weights = next(iter((place.out / "runs" / name).glob("seed-*/best.safetensors")), None)
    if weights is None:
        # What it costs does not depend on what it learned.
        weights = place.out / "fresh" / f"{name}.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_network(new_network(configuration(name)), weights, {})
    graph = place.graph(name)
    graph.parent.mkdir(parents=True, exist_ok=True)
    export(weights, graph, "0", "Apache-2.0", name=name)
    network = read_network(weights)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "macs": macs(network),
        "bytes": graph.stat().st_size,
    }


def macs(network: nn.Module) -> int:
    """Multiplications and additions for one image of 128×128, as pairs; SLSNet as it is served."""
    if isinstance(network, Generator):
        set_attention(network, "pooled")
        for module in network.modules():
            if isinstance(module, PositionAttention):
                module.mode = "plain"
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        network(torch.zeros(1, 3, MODEL_SIZE, MODEL_SIZE))
    return counter.get_total_flops() // 2


def _timed(place: Place, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds an image, by threads and size of batch, and memory."""
    pixels = np.stack(
        [
            sample.pixels
            for sample in load_samples(args.photos if args.photos.is_dir() else REFERENCE)
        ]
    )
    found: dict[str, dict[str, Any]] = {name: {"ms": {}, "cpu_ms": {}} for name in args.networks}
    for threads in sorted({1, available_cores()}):
        with ExitStack() as stack:
            engines = {}
            for name in args.networks:
                engines[name] = Contender("onnxruntime", place.graph(name), threads)
                stack.callback(engines[name].close)
            other = OtherWork([engine.pid for engine in engines.values()])
            figures: Figures = measure(engines, pixels, BATCHES, args.rounds, other)
            print(f"{threads} threads: {disturbance(figures.others)}", file=sys.stderr, flush=True)
            for name, engine in engines.items():
                for size in BATCHES:
                    key = f"{threads}x{size}"
                    found[name]["ms"][key] = figures.wall_ms(name, size)[1]
                    found[name]["cpu_ms"][key] = figures.cpu_ms(name, size)
                found[name]["memory_mb"] = _peak_mb(engine.pid)
    return found


def _peak_mb(pid: int) -> float:
    """The most memory that a process has held, in MB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(text.partition("VmHWM:")[2].split()[0]) / 1000


def _served(place: Place, args: argparse.Namespace) -> dict[str, float]:
    """Photos a second through a server of each network; medians of the turns."""
    photos = load_photos(args.photos)[0]
    load = Load("600×450", photos, CLIENTS)
    rates: dict[str, list[float]] = {name: [] for name in args.networks}
    for _ in range(args.turns):
        for name in args.networks:
            with serve("--model", str(place.graph(name))) as server:
                send(server, load)
                rates[name].append(send(server, load)[2])
    return {name: statistics.median(values) for name, values in rates.items()}


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


def rows(place: Place) -> tuple[dict[str, Any], list[Row], int | None]:
    """All figures: what they were measured on, a row a network, and the epochs of the training."""
    costs = json.loads(place.costs.read_text(encoding="utf-8"))
    found, epochs = [], None
    for name, facts in costs["networks"].items():
        scores = list(place.scores(name))
        epochs = scores[0]["epochs"] if scores else epochs
        found.append(
            Row(
                name,
                facts,
                statistics.mean(score["jaccard"] for score in scores) if scores else None,
                max(score["jaccard_standard_error"] for score in scores) if scores else None,
                len(scores),
            )
        )
    return costs, found, epochs


def table(place: Place) -> str:
    """The table as Markdown, the most accurate network first."""
    costs, found, epochs = rows(place)
    threads = costs["threads"]
    lines = [
        f"Machine: {costs['machine']}. Budget: {epochs or 'no'} epochs over the training photos."
        f" Milliseconds an image in ONNX Runtime, photos a second of {CLIENTS} clients through the"
        " server; medians.",
        "",
        "| network | Jaccard, validation | seeds | parameters, M | GMAC | file, MB | memory, MB"
        f" | 1 thread: 1 | of 8 | {threads} threads: 1 | of 8 | photos/s |",
        "|---|" + "--:|" * 11,
    ]
    for row in sorted(found, key=lambda row: -(row.jaccard or 0)):
        facts = row.costs
        score = "–" if row.jaccard is None else f"{row.jaccard:.4f} ± {row.error:.4f}"
        times = " | ".join(
            f"{facts['ms'][f'{count}x{size}']:.1f}" for count in (1, threads) for size in BATCHES
        )
        lines.append(
            f"| `{row.name}` | {score} | {row.seeds or '–'} | {facts['parameters'] / 1e6:.2f}"
            f" | {facts['macs'] / 1e9:.2f} | {facts['bytes'] / 1e6:.1f} | {facts['memory_mb']:.0f}"
            f" | {times} | {facts['photos_per_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(place: Place) -> Figure:
    """Accuracy against time, parameters and bytes; the line joins what nothing is better than."""
    _, found, _ = rows(place)
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
        for row, (x, y) in zip(scored, points, strict=True):
            axis.errorbar(x, y, row.error, fmt="o", color="#2b6cb0", capsize=3)
            axis.annotate(row.name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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


def report(place: Place, _: argparse.Namespace) -> None:
    """Write the table and the plots."""
    text = table(place)
    with replacing(place.out / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    if any(row.jaccard is not None for row in rows(place)[1]):
        plot(place).savefig(place.out / "pareto.svg")
    print(text)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=Help
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder of this budget's results")
    common.add_argument("--networks", nargs="+", choices=SERVED, default=SERVED, metavar="NAME")
    training = commands.add_parser("train", parents=[common], formatter_class=Help)
    add_data_arguments(training)
    training.add_argument("--epochs", type=int, default=2, help="of every training")
    training.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    training.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    training.set_defaults(work=train_all)
    costs = commands.add_parser("costs", parents=[common], formatter_class=Help)
    default = Path(os.environ.get("SLSNET_DATA", "../shared/data")) / "native"
    costs.add_argument("--photos", type=Path, default=default, help="folder of JPEGs")
    costs.add_argument("--rounds", type=int, default=10, help="of the engines, measured")
    costs.add_argument("--turns", type=int, default=3, help="of the servers")
    costs.set_defaults(work=measure_all)
    commands.add_parser("report", parents=[common], formatter_class=Help).set_defaults(work=report)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(arguments)
    args.work(Place(args.out), args)


if __name__ == "__main__":
    main()
