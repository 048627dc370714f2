"""SLSNet beside the networks of the zoo, by one hand: `python -m benchmarks.zoo`.

    python -m benchmarks.zoo train --out build/zoo --epochs 2
    python -m benchmarks.zoo costs --out build/zoo
    python -m benchmarks.zoo sides --out build/zoo
    python -m benchmarks.zoo report --out build/zoo

`train` gives every network the same photos, augmentation, loss, optimiser, number of epochs and
seeds, and scores it on the official validation set. With `--folds` each seed also keeps a fold of
the training photos out, and is scored on that too: `--folds 5 --seeds 0 1 2 3 4` holds out every
photo once. What is done is not repeated and a killed run goes on, so a budget can be spent in
pieces. `costs` exports every network, with its trained weights
where there are any, and times all of them in rounds, each in a process of its own, as the server
runs it; then each in a server, which gets real photos. `sides` times SLSNet and GAN-FCN at the
sides of table 3 of SLSNet's paper. `report` writes `table.md`, with the figures of the paper's
tables beside those of here, and `pareto.svg`.

`costs` adds to what an earlier call measured on the same machine, so large networks can be timed by
themselves, with fewer rounds.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu_engine import Contender, Figures, OtherWork, disturbance, measure
from benchmarks.latency import machine
from benchmarks.versions import Load, load_photos, send
from benchmarks.zoo_report import (
    BATCHES,
    CLIENTS,
    PAPER_MS,
    SIDES,
    Results,
    paper_table,
    plot,
    read,
    rows,
    sides_table,
    table,
)
from common.files import replacing
from common.program import Help
from model.config import TrainConfig, add_set_argument, load_config, parse_overrides
from model.data import add_data_arguments, find_samples
from model.evaluate import Evaluation, evaluate, load_network
from model.export import export, set_attention
from model.generator import Generator, input_size
from model.layers import PositionAttention
from model.loop import train
from model.names import SERVED
from model.networks import new_network, read_network, save_network
from model.splits import split_samples
from model.trainer import TrainingError
from photos.image import MODEL_SIZE
from server.cores import available_cores
from tests.support.launch import serve
from trt_build.samples import REFERENCE, load_samples

__all__ = ["main"]


# SLSNet learns in the form that it is served in.
_OPTIONS: dict[str, dict[str, Any]] = {"slsnet": {"generator.pam_pool": [8, 1], "pam_wake": 0}}

# Settings that have arguments of their own.
_ARGUMENTS = {
    "network": "--networks",
    "epochs": "--epochs",
    "seed": "--seeds",
    "data.folds": "--folds",
    "data.fold": "--folds and --seeds",
}


def configuration(name: str, **changes: Any) -> TrainConfig:
    """The training of a network; `changes` to the preset are the same for all."""
    overrides = {"network": name, **_OPTIONS.get(name, {}), **changes}
    return load_config("quick", overrides=overrides)


def train_all(results: Results, args: argparse.Namespace) -> None:
    """Train and score what is not scored yet, one seed after another.

    Raises:
        ValueError: `--set` changes what another argument sets, or what is in the folder had
            another budget.
    """
    changes = parse_overrides(args.set)
    for key in changes.keys() & _ARGUMENTS.keys():
        raise ValueError(f"--set {key}: use {_ARGUMENTS[key]}")
    samples = find_samples(args.data)
    for seed in args.seeds:
        for name in args.networks:
            folder = results.run(name, seed)
            if (folder / "score.json").exists():
                _check_budget(folder / "score.json", args)
                continue
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            if args.folds:
                changes |= {"data.folds": args.folds, "data.fold": seed % args.folds}
            config = configuration(name, epochs=args.epochs, seed=seed, **changes)
            train(config, args.data, folder, args.cache, resume=(folder / "last.pt").exists())
            network = load_network(folder / "best.safetensors", config.size)
            held_out = split_samples(config, samples, args.cache)[1]
            first, *fold = [_score(evaluate(chosen, network)) for chosen in held_out.values()]
            score = first | {"budget": _budget(args), "seed": seed}
            if fold:
                score["fold"] = fold[0] | {"fold": config.data.fold}
            _write(folder / "score.json", score)


def _budget(args: argparse.Namespace) -> str:
    """What every training of a table is given, in words."""
    folds = [f"one of {args.folds} folds held out"] if args.folds else []
    changes = [f"{key}={value}" for key, value in sorted(parse_overrides(args.set).items())]
    return ", ".join([f"epochs={args.epochs}", *changes, *folds])


def _check_budget(path: Path, args: argparse.Namespace) -> None:
    """Refuse to take a training of another budget for one of this.

    Raises:
        ValueError: it had other epochs, settings or folds.
    """
    budget = read(path, "budget")["budget"]
    if budget != _budget(args):
        raise ValueError(f"{path} is of {budget}: name another --out, or ask for the same")


def _score(result: Evaluation) -> dict[str, Any]:
    kept = ("jaccard", "jaccard_standard_error", "threshold_jaccard", "dice", "count")
    report = result.report()
    return {key: report[key] for key in kept}


def measure_all(results: Results, args: argparse.Namespace) -> None:
    """Export every network, and measure what it costs."""
    measured: dict[str, Any] = {"machine": _machine(), "threads": available_cores()}
    _measured(results.costs, measured)  # another machine is refused before the long part
    facts = {name: _exported(results, name) for name in args.networks}

    def keep(found: dict[str, dict[str, Any]]) -> None:
        for name in args.networks:
            facts[name] |= found[name]
        # Another call may have measured other networks meanwhile.
        networks = _measured(results.costs, measured) | facts
        _write(results.costs, measured | {"networks": networks})

    keep(_timed(results, args))
    keep(_served(results, args))


def _machine() -> str:
    return machine().partition(", load")[0]


def _measured(path: Path, where: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call measured on this machine, by network.

    Raises:
        ValueError: it was another machine, or the file is broken.
    """
    if not path.exists():
        return {}
    before = read(path, "networks")
    facts: dict[str, Any] = before.pop("networks")
    if before != where:
        raise ValueError(f"{path} was measured on another machine: name another --out")
    return facts


def _exported(results: Results, name: str) -> dict[str, Any]:
    """Write a network's graph; return parameters, multiplications and bytes."""
    trained = sorted((results.out / "runs" / name).glob("seed-*/best.safetensors"))
    # Costs are of one size of images, whatever the training's was.
    weights = next((path for path in trained if input_size(path) == MODEL_SIZE), None)
    if weights is None:
        weights = _fresh(results, name)
    graph = results.graph(name)
    graph.parent.mkdir(parents=True, exist_ok=True)
    export(weights, graph, "0", "Apache-2.0", name=name)
    network = read_network(weights)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "macs": macs(network),
        "bytes": graph.stat().st_size,
    }


def _fresh(results: Results, name: str) -> Path:
    """Weights of a network that is not trained: its costs do not depend on what it learned."""
    weights = results.out / "fresh" / f"{name}.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_network(_settled(new_network(configuration(name))), weights, {})
    return weights


def _settled(network: nn.Module) -> nn.Module:
    """A fresh network of the zoo whose norms have seen a batch, and is unsure; SLSNet as it is.

    Else the values of deep ones grow without bound, and rounding alone fails the export's check.
    """
    if isinstance(network, Generator):
        return network
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 8, 8, generator=generator)
    images = nn.functional.interpolate(coarse, (MODEL_SIZE, MODEL_SIZE))
    images += torch.randn(images.shape, generator=generator) / 20
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
        *_, last = (module for module in network.modules() if isinstance(module, nn.Conv2d))
        last.weight /= 8
    return network.eval()


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


def _timed(results: Results, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds an image, by threads and size of batch, and memory."""
    pixels = np.stack(
        [
            sample.pixels
            for sample in load_samples(args.photos if args.photos.is_dir() else REFERENCE)
        ]
    )
    found: dict[str, dict[str, Any]] = {name: {"ms": {}, "cpu_ms": {}} for name in args.networks}
    graphs = {name: results.graph(name) for name in args.networks}
    for threads in sorted({1, available_cores()}):
        with _contest("onnxruntime", graphs, threads, pixels, BATCHES, args.rounds) as (
            engines,
            figures,
        ):
            for name, engine in engines.items():
                for size in BATCHES:
                    key = f"{threads}x{size}"
                    found[name]["ms"][key] = figures.wall_ms(name, size)[1]
                    found[name]["cpu_ms"][key] = figures.cpu_ms(name, size)
                found[name]["memory_mb"] = _peak_mb(engine.pid)
    return found


@contextmanager
def _contest(
    backend: str | None,
    graphs: dict[str, Path],
    threads: int,
    pixels: NDArray[np.uint8],
    batches: Sequence[int],
    rounds: int,
) -> Iterator[tuple[dict[str, Contender], Figures]]:
    """Time graphs in turn, each in a process of its own, which lives until the end of the block.

    Args:
        backend: that runs them; None for stock ONNX Runtime, which takes images of any side.
        pixels: uint8 [count, side, side, 3].
    """
    with ExitStack() as stack:
        engines = {name: Contender(backend, graph, threads) for name, graph in graphs.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        other = OtherWork([engine.pid for engine in engines.values()])
        figures = measure(engines, pixels, batches, rounds, other)
        said = f"{pixels.shape[1]} pixels, {threads} threads: {disturbance(figures.others)}"
        print(said, file=sys.stderr, flush=True)
        yield engines, figures


def _peak_mb(pid: int) -> float:
    """The most memory that a process has held, in MB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(text.partition("VmHWM:")[2].split()[0]) / 1000


def _served(results: Results, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Photos a second through a server of each network; medians of the turns.

    None of a network that is too slow for so many clients, whose requests the server refuses.
    """
    photos = load_photos(args.photos)[0]
    load = Load("600×450", photos, CLIENTS)
    rates: dict[str, list[float]] = {name: [] for name in args.networks}
    for _ in range(args.turns):
        for name in args.networks:
            with serve("--model", str(results.graph(name))) as server:
                try:
                    send(server, load)
                    rates[name].append(send(server, load)[2])
                except RuntimeError as error:
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return {
        name: {"photos_per_s": statistics.median(values) if values else None}
        for name, values in rates.items()
    }


def measure_sides(results: Results, args: argparse.Namespace) -> None:
    """Time networks at the sides of the paper's table 3, in stock ONNX Runtime."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in args.networks}
    random = np.random.default_rng(0)
    for name in args.networks:
        fresh = _fresh(results, name)
        for side in args.sides:
            graph = results.graph(name, side)
            graph.parent.mkdir(parents=True, exist_ok=True)
            export(fresh, graph, "0", "Apache-2.0", size=side, name=name)
    for threads, side in itertools.product(sorted({1, available_cores()}), args.sides):
        pixels = random.integers(0, 256, (8, side, side, 3), np.uint8)
        graphs = {name: results.graph(name, side) for name in args.networks}
        with _contest(None, graphs, threads, pixels, (1,), args.rounds) as (_, figures):
            for name in args.networks:
                found[name].setdefault(str(threads), []).append(figures.wall_ms(name, 1)[1])
    _write(results.sides, {"machine": _machine(), "sides": args.sides, "networks": found})


def report(results: Results, _: argparse.Namespace) -> None:
    """Write the table and the plots."""
    costs, found, budget = rows(results)
    text = table(costs, found, budget)
    if missing := sorted(results.scored() - set(costs["networks"])):
        text += f"\nTrained, and left out until `costs` measures them: {', '.join(missing)}.\n"
    text += f"\n{paper_table(found)}\n"
    if results.sides.exists():
        text += f"\n{sides_table(results)}\n"
    with replacing(results.out / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    if any(row.jaccard is not None for row in found):
        with replacing(results.out / "pareto.svg") as path:
            plot(found).savefig(path)
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

    def add(name: str, does: str, networks: Sequence[str] = SERVED) -> argparse.ArgumentParser:
        command = commands.add_parser(name, formatter_class=Help, help=does)
        command.add_argument(
            "--out", type=Path, required=True, help="folder of this budget's results"
        )
        chosen = "all" if networks is SERVED else " ".join(networks)
        command.add_argument(
            "--networks",
            nargs="+",
            choices=SERVED,
            default=networks,
            metavar="NAME",
            help=f"of {', '.join(SERVED)} (default: {chosen})",
        )
        return command

    training = add("train", "train and score every network")
    add_data_arguments(training)
    training.add_argument("--epochs", type=int, default=2, help="epochs of every training")
    training.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="one training for each"
    )
    training.add_argument(
        "--folds",
        type=int,
        default=0,
        metavar="N",
        help="split the training photos into N folds; seed S trains without fold S modulo N"
        " (0: train on all)",
    )
    add_set_argument(training)
    training.set_defaults(work=train_all)
    costs = add("costs", "time every network, alone and in a server")
    default = Path(os.environ.get("SLSNET_DATA", "../shared/data")) / "native"
    costs.add_argument("--photos", type=Path, default=default, help="folder of JPEGs")
    costs.add_argument(
        "--rounds", type=int, default=10, help="rounds in which the networks are timed"
    )
    costs.add_argument("--turns", type=int, default=3, help="turns in which the servers are")
    costs.set_defaults(work=measure_all)
    sides = add("sides", "time networks at several sides of their input", tuple(PAPER_MS))
    sides.add_argument(
        "--rounds", type=int, default=10, help="rounds in which the networks are timed"
    )
    sides.add_argument(
        "--sides", nargs="+", type=int, default=SIDES, help="sides of the network's input, pixels"
    )
    sides.set_defaults(work=measure_sides)
    add("report", "write table.md and pareto.svg").set_defaults(work=report)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(arguments)
    try:
        args.work(Results(args.out), args)
    except (OSError, ValueError, TrainingError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
