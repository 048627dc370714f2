"""What a photo costs the host, beside a GPU that takes no time: `python -m benchmarks.feeders`.

The network is a stub that copies pixels in and a probability out, as a GPU's backend does. A closed
loop of clients sends photos to one process, and to feeders that share one network
(`--share-network yes`), in turn. The Markdown table has medians of the rounds:

- photos/s, and the CPU time of a photo in the processes that speak HTTP and in the network's own
- without decoding: the same without the time that one thread takes to decode the photo alone
- on 16 cores: 16 s divided by that. It supposes that cores add up, and that the load takes none of
  them. `python -m benchmarks.ring` says how many photos one network's process can pass on

Load and server share this machine's cores. The photos/s are bound by that, the CPU times hardly.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.latency import machine
from benchmarks.peers.client import closed_loop, post
from common.program import Help
from common.tables import markdown
from photos.image import read_photo
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo
from tests.support.waiting import until

ARRANGEMENTS = {
    "one process": (),
    "1 feeder": ("--workers", "1", "--share-network", "yes"),
    "2 feeders": ("--workers", "2", "--share-network", "yes"),
}
"""Flags of the servers that are compared."""

_CORES = 16
_HEAD = (
    "arrangement",
    "photos/s",
    "HTTP, µs of CPU a photo",
    "network's process",
    "both",
    "without decoding",
    f"photos/s on {_CORES} cores",
)


@dataclass(frozen=True)
class Round:
    """One arrangement under load."""

    photos_per_s: float
    http_us: float
    """CPU time of a photo in the processes that speak HTTP; like the next, in microseconds."""
    network_us: float
    """The same in the network's own process; 0 where it has none."""


def measure(flags: Sequence[str], photo: bytes, *, clients: int, seconds: float) -> Round:
    """Start a server with these flags, and send it the photo again and again."""
    environment = {"PEER_NETWORK": "copies"}
    command = ("-m", "benchmarks.peers.slsnet")
    request = post("/segment", photo, {"Content-Type": "image/jpeg"})
    with serve(*flags, environment=environment, command=command) as server:
        until(lambda: _figure(server, "slsnet_ready") == 1)
        before = _used_s(server), _figure(server, "slsnet_batch_size_sum")
        load = closed_loop(server.port, [request], clients=clients, seconds=seconds, lead_s=1)
        after = _used_s(server), _figure(server, "slsnet_batch_size_sum")
    assert all(answer.status == 200 for answer in load.answers), "an answer that is no mask"
    photos = after[1] - before[1]
    http_s, network_s = (used - was for used, was in zip(after[0], before[0], strict=True))
    return Round(len(load.answers) / load.seconds, http_s / photos * 1e6, network_s / photos * 1e6)


def _used_s(server: ServerProcess) -> tuple[float, float]:
    """CPU seconds that the server's processes have used: those of HTTP, and the network's."""
    first = psutil.Process(server.process.pid)
    used = {True: 0.0, False: 0.0}
    for process in [first, *first.children()]:
        times = process.cpu_times()
        used["server.process.owner" in process.cmdline()] += times.user + times.system
    return used[False], used[True]


def _figure(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return next(
        (
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ),
        0.0,
    )


def decode_us(photo: bytes, turns: int = 200) -> float:
    """Microseconds of CPU time in which one thread decodes the photo: the median."""
    taken = []
    for _ in range(turns):
        started = time.thread_time()
        read_photo(photo)
        taken.append((time.thread_time() - started) * 1e6)
    return statistics.median(taken)


def table(rounds: dict[str, list[Round]], decoding_us: float) -> str:
    """The medians as a Markdown table."""
    rows = []
    for name, mine in rounds.items():
        http_us = statistics.median(found.http_us for found in mine)
        network_us = statistics.median(found.network_us for found in mine)
        rest_us = http_us + network_us - decoding_us
        rows.append(
            (
                name,
                f"{statistics.median(found.photos_per_s for found in mine):.0f}",
                f"{http_us:.0f}",
                f"{network_us:.0f}" if network_us else "–",
                f"{http_us + network_us:.0f}",
                f"{rest_us:.0f}",
                f"{_CORES * 1e6 / rest_us:,.0f}",
            )
        )
    return markdown(_HEAD, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feeders", description=__doc__, formatter_class=Help
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each arrangement, in turn")
    parser.add_argument("--seconds", type=float, default=5, help="length of a round")
    parser.add_argument(
        "--clients", type=int, default=32, help="clients that send at the same time"
    )
    parser.add_argument("--width", type=int, default=600, help="width of the photo, in pixels")
    parser.add_argument("--height", type=int, default=450, help="its height, in pixels")
    options = parser.parse_args(arguments)
    photo = drawn_photo(0, options.width, options.height)
    rounds: dict[str, list[Round]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, flags in ARRANGEMENTS.items():
            rounds[name].append(
                measure(flags, photo, clients=options.clients, seconds=options.seconds)
            )
    decoding_us = decode_us(photo)
    print(
        f"Machine: {machine()}. A JPEG of {options.width}×{options.height} ({len(photo)} bytes),"
        f" decoded in {decoding_us:.0f} µs; {options.clients} clients.\n"
    )
    print(table(rounds, decoding_us))


if __name__ == "__main__":
    main()
