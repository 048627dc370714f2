"""`python -m benchmarks.ray_replicas`: what Ray's hops cost, and what more replicas bring here.

The same photos go to a server without Ray, then to 1, 2 and 4 replicas on a Ray cluster of two
nodes on this machine, all with one thread for the network; then to the server again, as machines
get faster and slower. CPU time is counted beside requests a second: replicas, clients and all of
Ray share this machine's cores, so that seconds of CPU a request, unlike requests a second, hold
for larger ones too.
"""

import argparse
import http.client
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from benchmarks.launch import serve
from benchmarks.photos import Card, deal, generated
from benchmarks.ray_cluster import GATEWAY, PROXY, SEGMENTER, RayService, ray_service
from server.settings import Settings, available_cores

__all__ = ["Figures", "measure", "report"]

REPLICAS = (1, 2, 4)


@dataclass(frozen=True)
class Figures:
    """Of one way to serve."""

    name: str
    requests_per_s: float
    """With all clients."""
    lone_ms: float
    """Median of a lone client."""
    cpu_ms: dict[str, float]
    """A request's, by kind of process, with all clients."""
    failed: int


def main() -> int:
    """Measure, and print a table; gives the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_replicas",
        description="Requests a second on 1, 2 and 4 replicas beside a server without Ray.",
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10, help="for each way to serve")
    args = parser.parse_args()
    cards = generated(Settings().model).cards
    rows = [_alone("without Ray", cards, args.clients, args.seconds)]
    with ray_service() as service:
        for replicas in REPLICAS:
            service.deploy(replicas)
            rows.append(_on_ray(service, replicas, cards, args.clients, args.seconds))
    rows.append(_alone("without Ray, again", cards, args.clients, args.seconds))
    print(report(rows, args.clients))
    return int(any(row.failed for row in rows))


def _alone(name: str, cards: Sequence[Card], clients: int, seconds: float) -> Figures:
    flags = ("--threads", "1", "--decode-threads", "1", "--log-level", "warning")
    with serve(*flags) as server:
        process = psutil.Process(server.process.pid)
        return measure(name, server.url, cards, clients, seconds, lambda: {"server": [process]})


def _on_ray(
    service: RayService, replicas: int, cards: Sequence[Card], clients: int, seconds: float
) -> Figures:
    return measure(
        f"Ray, {replicas} replica{'s' if replicas > 1 else ''}",
        service.url,
        cards,
        clients,
        seconds,
        lambda: {
            "replicas": service.processes(SEGMENTER),
            "gateway": service.processes(GATEWAY),
            "proxy": service.processes(PROXY),
        },
    )


def measure(
    name: str,
    url: str,
    cards: Sequence[Card],
    clients: int,
    seconds: float,
    processes: Callable[[], dict[str, list[psutil.Process]]],
) -> Figures:
    """Load `url` with one client, then with all of them, `seconds` each after a warm-up."""
    _load(url, cards, clients, seconds / 4)
    lone, lone_failed = _load(url, cards, 1, seconds / 2)
    watched = processes()
    before = {kind: _cpu_s(found) for kind, found in watched.items()}
    taken, failed = _load(url, cards, clients, seconds)
    cpu_ms = {
        kind: 1000 * (_cpu_s(found) - before[kind]) / len(taken) for kind, found in watched.items()
    }
    return Figures(
        name,
        len(taken) / seconds,
        1000 * statistics.median(lone),
        cpu_ms,
        failed + lone_failed,
    )


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def _load(url: str, cards: Sequence[Card], clients: int, seconds: float) -> tuple[list[float], int]:
    """Seconds of each request that was answered with its mask, and how many were not."""
    until = time.monotonic() + seconds
    lock = threading.Lock()
    dealt = deal(cards)
    taken: list[float] = []
    wrong = itertools.count()

    def send() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        while time.monotonic() < until:
            with lock:
                card = next(dealt)
            started = time.perf_counter()
            connection.request("POST", "/segment", card.body, {"Content-Type": card.content_type})
            response = connection.getresponse()
            answer = response.read()
            took_s = time.perf_counter() - started
            if response.status != 200 or card.expected.verdict(answer, "fp32") == "wrong":
                next(wrong)
            else:
                taken.append(took_s)
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        for client in [pool.submit(send) for _ in range(clients)]:
            client.result()
    return taken, next(wrong)


def report(rows: Sequence[Figures], clients: int) -> str:
    """A table in Markdown; ratios are to the mean of the runs without Ray."""
    bare = [row for row in rows if "server" in row.cpu_ms]
    requests_per_s = statistics.mean(row.requests_per_s for row in bare)
    lone_ms = statistics.mean(row.lone_ms for row in bare)
    lines = [
        f"{available_cores()} cores for all of it, clients too. {clients} clients; one thread a"
        " network.",
        "",
        "| | requests/s | ratio | lone client, ms | ratio | CPU ms a request | of it Ray's hops |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        hops = row.cpu_ms.get("gateway", 0) + row.cpu_ms.get("proxy", 0)
        lines.append(
            f"| {row.name} | {row.requests_per_s:.1f} | {row.requests_per_s / requests_per_s:.2f} |"
            f" {row.lone_ms:.1f} | {row.lone_ms / lone_ms:.2f} |"
            f" {sum(row.cpu_ms.values()):.1f} | {hops:.1f} |"
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
