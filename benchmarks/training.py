"""Training speed, beside a plain eager implementation: `python -m benchmarks.training`.

It times whole steps (augmentation, forward, loss, backward, optimiser) of the shipped recipe in
model.train, and of a plain form of the same network and losses: float32, contiguous NCHW, the
attentions' H·W × H·W matrices in memory, nothing asleep. The cases take turns, so that other work
on the machine falls on all of them. The recipe's rate is that of its whole schedule: the
half-resolution attention is asleep for `pam_wake` of it, and awake for the rest. Two more cases
average keys and values at half resolution over 8×8 positions, and one of them those at quarter
resolution over 4×4 too, with every attention awake.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.program import Help
from model import losses
from model.augment import Augmenter
from model.config import PRESETS, TrainConfig
from model.data import PixelSet
from model.generator import Generator
from model.layers import PositionAttention
from model.splits import STORED_SIZE
from model.trainer import Trainer

Step = Callable[[], float]


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--batch-size", type=int, default=8, help="photos in a step")
    parser.add_argument("--size", type=int, default=128, help="side of the input, pixels")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each case")
    args = parser.parse_args(argv)
    config = dataclasses.replace(PRESETS["best"], batch_size=args.batch_size, size=args.size)
    pooled, pooled_twice = (
        dataclasses.replace(
            config, generator=dataclasses.replace(config.generator, pam_pool=(8, quarter))
        )
        for quarter in (1, 4)
    )
    rng = np.random.default_rng(0)
    pixels = PixelSet(
        tuple(str(i) for i in range(args.batch_size)),
        rng.integers(0, 256, (args.batch_size, 3, STORED_SIZE, STORED_SIZE), np.uint8),
        rng.integers(0, 2, (args.batch_size, 1, STORED_SIZE, STORED_SIZE), np.uint8) * 255,
    )
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "recipe, half-resolution attention asleep": _recipe(
                config, pixels, Path(folder), asleep=True
            ),
            "recipe, half-resolution attention awake": _recipe(
                config, pixels, Path(folder), asleep=False
            ),
            "pooled attention, all awake": _recipe(pooled, pixels, Path(folder), asleep=False),
            "pooled at quarter resolution too": _recipe(
                pooled_twice, pixels, Path(folder), asleep=False
            ),
            "plain eager": _plain(config, pixels),
        }
        seconds = _take_turns(steps, args.rounds)
    each = [statistics.median(s) / args.batch_size for s in seconds.values()]
    asleep, awake, pooled_awake, twice, plain = each
    schedule = config.pam_wake * asleep + (1 - config.pam_wake) * awake
    print(f"{_machine()}, batch {args.batch_size}, {args.size}×{args.size}\n")
    print("| a training step | images/s |\n|---|---:|")
    for name, value in zip(steps, each, strict=True):
        print(f"| {name} | {1 / value:.3g} |")
    print(f"| **recipe, whole schedule** ({config.pam_wake:.0%} asleep) | **{1 / schedule:.3g}** |")
    print(f"\nrecipe / plain eager: {plain / schedule:.2f}")
    print(f"pooled, all awake / exact, all awake: {awake / pooled_awake:.2f}")
    print(f"pooled at quarter resolution too / exact, all awake: {awake / twice:.2f}")


def _recipe(config: TrainConfig, pixels: PixelSet, folder: Path, *, asleep: bool) -> Step:
    trainer = Trainer(
        dataclasses.replace(config, pam_wake=1.0 if asleep else 0.0),
        folder,
        pixels,
        {"validation": pixels},
    )
    trainer.network.train()
    order = torch.arange(config.batch_size, device=trainer.device)

    def step() -> float:
        return float(trainer.step(order)["loss"])

    return step


def _plain(config: TrainConfig, pixels: PixelSet) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Generator(config.generator).to(device).train()
    for module in network.modules():
        if isinstance(module, PositionAttention):
            module.mode = "plain"
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate)
    augmenter = Augmenter(config.augment, config.size, STORED_SIZE, device)
    images, masks = (torch.from_numpy(a).to(device) for a in (pixels.images, pixels.masks))

    def step() -> float:
        x, truth = augmenter(images, masks, 0)
        logits = network(x)
        loss = losses.bce_loss(logits, truth) + losses.jaccard_loss(logits.sigmoid(), truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def _take_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case's steps, one in each round; reading the loss waits for the device."""
    for step in steps.values():
        for _ in range(6 if torch.cuda.is_available() else 1):  # graphs are captured meanwhile
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
