"""Goodput when too many come, beside peers: `python -m benchmarks.peers.overload`.

Each server runs the stub network of 5 ms. Its throughput is measured in a closed loop. Then photos
come at fixed multiples of that, whatever becomes of the earlier ones (an open loop), on a thousand
connections at most. The Markdown table has medians of the rounds:

- goodput: masks a second, from the first photo's due time to the last one's
- of its own: divided by the server's throughput in the closed loop of the same round; of the best
  peer's: divided by the largest goodput of a peer at the same multiple
- offered: photos that were due. Where fewer than 95 % of them could be sent, since all connections
  waited for answers or the load itself was the limit, the line says so. Server and load share the
  cores, and the last column says how many the load took
- p99 counts from when a photo was due
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.latency import machine
from benchmarks.peers.__main__ import generated
from benchmarks.peers.client import closed_loop, open_loop
from benchmarks.peers.entrants import ENTRANTS, OURS, Entrant
from benchmarks.peers.figures import Overload, overload_of
from benchmarks.peers.measure import layout
from benchmarks.peers.processes import Unavailable, end_on_signals, prepare, python_of, running
from common.program import Help
from common.tables import markdown

_STUB_MS = 5
_TIMES = (1.0, 2.0, 10.0)
_CLIENTS = 64
"""Number of clients in the closed loop, which is enough for full batches."""
_HEAD = (
    "server",
    "load",
    "offered/s",
    "masks/s",
    "of its own",
    "of the best peer's",
    "p99, ms",
    "refused",
    "lost",
    "load, cores",
)
_SENT = 0.95
"""Share of due photos that must have been sent; below it, the table notes it."""


@dataclass(frozen=True)
class Round:
    """The figures of one server in one round."""

    entrant: str
    best_per_s: float
    """Throughput in the closed loop."""
    loads: dict[float, Overload]
    """Open loops, by multiple of that throughput."""
    generator_cores: dict[float, float]


def measure(entrant: Entrant, python: Path, times: Sequence[float], seconds: float) -> Round:
    """Start the server, send it load, and stop it.

    Raises:
        Unavailable: the server does not start.
    """
    photos = generated()
    requests = [entrant.ask(photo) for photo in photos]
    workers, threads = layout(entrant)
    environment = {
        "PEER_NETWORK": f"stub:{_STUB_MS}",
        "PEER_WORKERS": str(workers),
        "PEER_THREADS": str(threads),
    }
    loads, cores = {}, {}
    with running(entrant, python, environment, _STUB_MS, photos[0]) as server:
        load = closed_loop(server.port, requests, clients=_CLIENTS, seconds=seconds, lead_s=1)
        best_per_s = sum(answer.status == 200 for answer in load.answers) / load.seconds
        for multiple in times:
            per_s = multiple * best_per_s
            load = open_loop(server.port, requests, per_s=per_s, seconds=seconds)
            loads[multiple] = overload_of(load, per_s, seconds)
            cores[multiple] = load.cpu_s / load.seconds
    return Round(entrant.name, best_per_s, loads, cores)


def table(rounds: Sequence[Round], times: Sequence[float]) -> str:
    """The medians as a Markdown table."""
    rows = []
    of = {name: [f for f in rounds if f.entrant == name] for name in (f.entrant for f in rounds)}
    for multiple in times:
        goodput = {
            name: statistics.median(found.loads[multiple].served_per_s for found in mine)
            for name, mine in of.items()
        }
        best = max((per_s for name, per_s in goodput.items() if name != OURS), default=0)
        for name, mine in of.items():
            at = [found.loads[multiple] for found in mine]
            sent = min(1 - load.unsent / (load.offered_per_s * load.seconds) for load in at)
            own = [found.loads[multiple].served_per_s / found.best_per_s for found in mine]
            rows.append(
                [
                    name,
                    f"{multiple:g}×",
                    f"{statistics.median(load.offered_per_s for load in at):.0f}"
                    + (f", {sent:.0%} sent" if sent < _SENT else ""),
                    f"{goodput[name]:.0f}",
                    f"{statistics.median(own):.2f}",
                    f"{goodput[name] / best:.2f}" if best else "–",
                    f"{statistics.median(load.p99_ms for load in at):.0f}",
                    f"{statistics.median(sum(load.refused.values()) for load in at):.0f}",
                    f"{statistics.median(load.lost for load in at):.0f}",
                    f"{statistics.median(found.generator_cores[multiple] for found in mine):.2f}",
                ]
            )
    return markdown(_HEAD, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.overload",
        description=__doc__,
        formatter_class=Help,
    )
    names = [entrant.name for entrant in ENTRANTS if entrant.stubs]
    parser.add_argument(
        "--servers",
        nargs="+",
        choices=names,
        default=[OURS, "mosec", "litserve"],
        metavar="NAME",
        help=f"of {', '.join(names)}",
    )
    parser.add_argument(
        "--times",
        nargs="+",
        type=float,
        default=_TIMES,
        help="loads, as multiples of a server's throughput",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server")
    parser.add_argument("--seconds", type=float, default=3, help="length of each load")
    options = parser.parse_args(arguments)
    entrants = [entrant for entrant in ENTRANTS if entrant.name in options.servers]
    pythons = {}
    for entrant in entrants:
        try:
            prepare(entrant)
            pythons[entrant] = Path(sys.executable) if entrant.is_ours else python_of(entrant)
        except Unavailable as error:
            print(f"{entrant.name} is left out: {error}", file=sys.stderr)
    rounds: list[Round] = []
    plan = f"{options.rounds} rounds of {options.seconds:g} s"
    print(f"{machine()}; stub of {_STUB_MS} ms, {plan}.\n", flush=True)
    for number in range(options.rounds):
        order = entrants if number % 2 else reversed(entrants)
        rounds += [
            measure(entrant, pythons[entrant], options.times, options.seconds)
            for entrant in order
            if entrant in pythons
        ]
    print(table(rounds, options.times))
    return 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
