"""Cores for a rate and cost of a million photos, from latency: `python -m benchmarks.sizing`.

    python -m benchmarks.latency --cores 1 > latency.md
    python -m benchmarks.sizing latency.md --photos-per-s 50 --core-price 0.045

It reads the table of `benchmarks.latency` in a Markdown file (default: docs/benchmarks.md) and
prints those of docs/operations.md. A photo costs a core the whole of a lone request on one core;
beside a GPU, the network's time is subtracted. The client shared that core, so both costs are a
little too high.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.program import Help

HEADROOM = 0.7
"""Share of a server's throughput at which it still answers about as fast as an idle one."""

_ROW = re.compile(r"^\| (\d+×\d+) \|[^|]*\| *([\d.]+) \|.*\| *\*\*([\d.]+)\*\* \|[^|]*\|$")


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one core that a photo of this size takes."""

    photo: str
    whole_ms: float
    not_network_ms: float

    @property
    def per_s(self) -> float:
        """Photos a second on one core."""
        return 1000 / self.whole_ms

    @property
    def per_s_beside_gpu(self) -> float:
        """Photos a second on one core, where the network runs on a GPU."""
        return 1000 / self.not_network_ms


@dataclass(frozen=True)
class Prices:
    """Prices in dollars an hour, and what is bought for them."""

    core: float
    gpu: float
    gpu_cores: int
    use: float
    """Mean share of the paid time that is used."""


def read_costs(markdown: str) -> list[Cost]:
    """Read the rows of the first such table. Raises ValueError where there is none."""
    rows = [_ROW.match(line) for line in markdown.splitlines()]
    costs = [Cost(row[1], float(row[2]), float(row[3])) for row in rows if row]
    if not costs:
        raise ValueError("no table of benchmarks.latency in it")
    return costs


def tables(costs: Sequence[Cost], photos_per_s: float, prices: Prices) -> str:
    """Make both tables, as Markdown."""
    return "\n".join([*_sizing(costs, photos_per_s), "", *_costs(costs, prices)])


def _sizing(costs: Sequence[Cost], photos_per_s: float) -> Iterator[str]:
    yield (
        "| photo | whole, ms | photos/s a core | not the network, ms | photos/s a core beside a GPU"
        f" | cores for {photos_per_s:g}/s | beside a GPU |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for cost in costs:
        cores = photos_per_s / cost.per_s / HEADROOM
        beside = photos_per_s / cost.per_s_beside_gpu / HEADROOM
        yield (
            f"| {cost.photo} | {cost.whole_ms:.1f} | {cost.per_s:.1f} | {cost.not_network_ms:.1f}"
            f" | {cost.per_s_beside_gpu:.0f} | {cores:.1f} | {beside:.1f} |"
        )


def _costs(costs: Sequence[Cost], prices: Prices) -> Iterator[str]:
    use = f"{prices.use:.0%}".replace("%", " %")
    yield (
        f"| photo | CPU: core hours a million | $ at 100 % | $ at {use}"
        f" | GPU with {prices.gpu_cores} cores: photos/s | hours a million | $ at 100 %"
        f" | $ at {use} |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for cost in costs:
        core_hours = 1e6 / cost.per_s / 3600
        on_cpu = core_hours * prices.core
        gpu_per_s = cost.per_s_beside_gpu * prices.gpu_cores
        gpu_hours = 1e6 / gpu_per_s / 3600
        on_gpu = gpu_hours * prices.gpu
        yield (
            f"| {cost.photo} | {core_hours:.1f} | {on_cpu:.2f} | {on_cpu / prices.use:.2f}"
            f" | {gpu_per_s:.0f} | {gpu_hours:.2f} | {on_gpu:.2f} | {on_gpu / prices.use:.2f} |"
        )


def main() -> None:
    """Read, compute and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=Path("docs/benchmarks.md"),
        help="of the table of latencies",
    )
    parser.add_argument(
        "--photos-per-s", type=float, default=50, help="photos a second at the peak"
    )
    parser.add_argument("--core-price", type=float, default=0.045, help="$ an hour for a CPU core")
    parser.add_argument("--gpu-price", type=float, default=0.98, help="$ an hour, its cores too")
    parser.add_argument("--gpu-cores", type=int, default=8, help="CPU cores beside that GPU")
    parser.add_argument("--use", type=float, default=0.6, help="mean use of what is paid for")
    options = parser.parse_args()
    prices = Prices(options.core_price, options.gpu_price, options.gpu_cores, options.use)
    try:
        costs = read_costs(options.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.file}: {error}")
    print(tables(costs, options.photos_per_s, prices))


if __name__ == "__main__":
    main()
