"""`python -m benchmarks.ray_replicas`: the cost of Ray's hops, and the gain of more replicas.

The same photos go to a server without Ray, then to 1, 2 and 4 replicas on a Ray cluster of two
nodes on this machine, all with one thread for the network. Then they go to the server again, since
a machine's speed varies. CPU time is counted beside requests a second: replicas, clients and Ray
share this machine's cores, so only seconds of CPU a request hold for larger machines too. Ray's
work beside the requests (raylets, GCS, Serve's controller, agents) is counted by the second.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from benchmarks.deck import Card, deal, generated
from common.program import Help
from server.cores import available_cores
from server.settings import Settings
from tests.support.launch import serve
from tests.support.ray_cluster import GATEWAY, PROXY, SEGMENTER, RayService, ray_service

REPLICAS = (1, 2, 4)


@dataclass(frozen=True)
class Figures:
    """The figures of one way to serve."""

    name: str
    requests_per_s: float
    """Requests a second with all clients."""
    lone_ms: float
    """Median latency of a lone client."""
    cpu_ms: dict[str, float]
    """CPU time of a request by kind of process, with all clients."""
    rest_cpu: float
    """Cores that Ray's other processes kept busy meanwhile."""
    failed: int


class NothingAnsweredError(Exception):
    """No request was answered, so there is nothing to measure."""


@dataclass(frozen=True)
class Watched:
    """Processes whose CPU time is counted."""

    serving: dict[str, list[psutil.Process]]
    rest: list[psutil.Process]


@dataclass(frozen=True)
class Load:
    """The outcome of the requests of some clients."""

    taken_s: list[float]
    """Latency of each request that was answered with its mask."""
    requests_per_s: float
    took_s: float
    """Seconds until the last answer."""
    failed: int


def main() -> int:
    """Measure, and print a table; return the process's exit code."""
    parser = argparse.ArgumentParser(
        formatter_class=Help,
        prog="python -m benchmarks.ray_replicas",
        description=__doc__,
    )
    parser.add_argument("--clients", type=int, default=8, help="that send at the same time")
    parser.add_argument("--seconds", type=float, default=10, help="for each way to serve")
    args = parser.parse_args()
    cards = generated(Settings().model).cards
    try:
        rows = [_alone("without Ray", cards, args.clients, args.seconds)]
        with ray_service() as service:
            for replicas in REPLICAS:
                service.deploy(replicas)
                rows.append(_on_ray(service, replicas, cards, args.clients, args.seconds))
        rows.append(_alone("without Ray, again", cards, args.clients, args.seconds))
    except NothingAnsweredError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(rows, args.clients))
    return int(any(row.failed for row in rows))


def _alone(name: str, cards: Sequence[Card], clients: int, seconds: float) -> Figures:
    flags = ("--threads", "1", "--decode-threads", "1", "--log-level", "warning")
    with serve(*flags) as server:
        watched = Watched({"server": [psutil.Process(server.process.pid)]}, [])
        return measure(name, server.url, cards, clients, seconds, lambda: watched)


def _on_ray(
    service: RayService, replicas: int, cards: Sequence[Card], clients: int, seconds: float
) -> Figures:
    return measure(
        f"Ray, {replicas} replica{'s' if replicas > 1 else ''}",
        service.url,
        cards,
        clients,
        seconds,
        lambda: _of_ray(service),
    )


def _of_ray(service: RayService) -> Watched:
    serving = {
        "replicas": service.processes(SEGMENTER),
        "gateway": service.processes(GATEWAY),
        "proxy": service.processes(PROXY),
    }
    known = set(itertools.chain.from_iterable(serving.values()))
    return Watched(serving, [each for each in service.processes() if each not in known])


def measure(
    name: str,
    url: str,
    cards: Sequence[Card],
    clients: int,
    seconds: float,
    processes: Callable[[], Watched],
) -> Figures:
    """Load `url` with one client, then with all of them, `seconds` each after a warm-up.

    Raises:
        NothingAnsweredError: not one request was answered with its mask.
    """
    _load(url, cards, clients, seconds / 4)
    lone = _load(url, cards, 1, seconds / 2)
    watched = processes()
    before = {kind: _cpu_s(found) for kind, found in watched.serving.items()}
    rest_before = _cpu_s(watched.rest)
    load = _load(url, cards, clients, seconds)
    if not lone.taken_s or not load.taken_s:
        raise NothingAnsweredError(f"{name}: no request was answered with its mask")
    cpu_ms = {
        kind: 1000 * _more(before[kind], _cpu_s(found)) / len(load.taken_s)
        for kind, found in watched.serving.items()
    }
    return Figures(
        name,
        load.requests_per_s,
        1000 * statistics.median(lone.taken_s),
        cpu_ms,
        _more(rest_before, _cpu_s(watched.rest)) / load.took_s,
        load.failed + lone.failed,
    )


def _cpu_s(processes: Sequence[psutil.Process]) -> dict[int, float]:
    """CPU time of each process that still runs, since an agent of Ray's may end at any time."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def _more(before: dict[int, float], after: dict[int, float]) -> float:
    return sum(seconds - before[pid] for pid, seconds in after.items())


def _load(url: str, cards: Sequence[Card], clients: int, seconds: float) -> Load:
    """Send for so long. Requests under way at the end are awaited, and count with their time: a
    client's pace is its answers over the time until its own last one.
    """
    with urllib.request.urlopen(f"{url}/model", timeout=60) as answer:
        precision = json.load(answer)["backend"]["precision"]
    begun = time.monotonic()
    until = begun + seconds
    lock = threading.Lock()
    dealt = deal(cards)
    taken: list[float] = []
    wrong = itertools.count()

    def send() -> float:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        answered = 0
        while time.monotonic() < until:
            with lock:
                card = next(dealt)
            started = time.perf_counter()
            try:
                connection.request(
                    "POST", "/segment", card.body, {"Content-Type": card.content_type}
                )
                response = connection.getresponse()
                mask = response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                next(wrong)
                continue
            took_s = time.perf_counter() - started
            if response.status != 200 or card.expected.verdict(mask, precision) == "wrong":
                next(wrong)
            else:
                taken.append(took_s)
                answered += 1
        connection.close()
        return answered / (time.monotonic() - begun)

    with ThreadPoolExecutor(clients) as pool:
        sending = [pool.submit(send) for _ in range(clients)]
        requests_per_s = sum(client.result() for client in sending)
    return Load(taken, requests_per_s, time.monotonic() - begun, next(wrong))


def report(rows: Sequence[Figures], clients: int) -> str:
    """A table in Markdown. Its ratios are to the mean of the runs without Ray."""
    bare = [row for row in rows if "server" in row.cpu_ms]
    requests_per_s = statistics.mean(row.requests_per_s for row in bare)
    lone_ms = statistics.mean(row.lone_ms for row in bare)
    lines = [
        f"{available_cores()} cores for all of it, clients too. {clients} clients; one thread a"
        " network.",
        "",
        "| | requests/s | ratio | lone client, ms | ratio | CPU ms a request | of it Ray's hops |"
        " beside it, cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        hops = row.cpu_ms.get("gateway", 0) + row.cpu_ms.get("proxy", 0)
        lines.append(
            f"| {row.name} | {row.requests_per_s:.1f} | {row.requests_per_s / requests_per_s:.2f} |"
            f" {row.lone_ms:.1f} | {row.lone_ms / lone_ms:.2f} |"
            f" {sum(row.cpu_ms.values()):.1f} | {hops:.1f} | {row.rest_cpu:.2f} |"
        )
    failed = sum(row.failed for row in rows)
    lines += ["", f"{failed} requests failed or had a wrong mask."]
    for row in rows:
        if "proxy" in row.cpu_ms:
            parts = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row.cpu_ms.items())
            lines.append(f"- {row.name}: CPU ms a request: {parts}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
