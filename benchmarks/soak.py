"""A long run at more than the server can do: nothing may grow, and nobody may wait in vain.

    python -m benchmarks.soak --minutes 30

Measures what the server can serve, then sends 1.5 times as much from clients that do not wait for
each other. Served requests must come within their deadline, the excess be refused with 429, no
request be lost, every mask be its own photo's, and memory, files and threads stay as they were.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import psutil

from benchmarks.launch import ServerProcess, serve
from tests.lesions import encode_photo, lesion_photo

__all__ = ["Soak", "soak"]

_DEADLINE_MS = 2000
_CLIENTS = 64
_LIMITS = httpx.Limits(max_connections=_CLIENTS, max_keepalive_connections=_CLIENTS)
# Threads start and buffers settle in the first part, which memory is not compared with.
_SETTLING = 0.25


@dataclass
class Soak:
    """What was seen."""

    capacity_per_s: float = 0
    statuses: Counter[str] = field(default_factory=Counter)
    mixed_up: int = 0
    served_ms: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    """Of the server, each second."""
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    in_flight_after: float = 0

    def faults(self, memory_tolerance: float) -> list[str]:
        """What must not have been; `memory_tolerance` is a fraction."""
        faults = []
        allowed = {"200", "429", "504"}
        if lost := {name: n for name, n in self.statuses.items() if name not in allowed}:
            faults.append(f"answers that are no answers: {lost}")
        if not self.statuses["200"] or not self.statuses["429"]:
            faults.append(f"not served and refused both: {dict(self.statuses)}")
        if self.mixed_up:
            faults.append(f"{self.mixed_up} masks are not their photo's")
        # The deadline is the server's; the way back is not in it.
        if _quantile(self.served_ms, 0.99) > _DEADLINE_MS * 1.5:
            faults.append(f"p99 {_quantile(self.served_ms, 0.99):.0f} ms")
        for name, values, slack in (
            ("memory", self.memory_mib, memory_tolerance),
            ("files", self.files, 0.1),
            ("threads", self.threads, 0.0),
        ):
            settled = list(values[round(len(values) * _SETTLING) :])
            half = len(settled) // 2
            before, after = _quantile(settled[:half], 0.5), _quantile(settled[half:], 0.5)
            if after > before * (1 + slack) + (0 if name == "memory" else 2):
                faults.append(f"{name} grew from {before:.1f} to {after:.1f}")
        if self.in_flight_after:
            faults.append(f"{self.in_flight_after:g} requests are still in flight")
        return faults


def soak(seconds: float, overload: float = 1.5) -> Soak:
    """Start a server and send `overload` times what it can serve for so long."""
    result = Soak()
    photos = [encode_photo(lesion_photo(seed, 300, 220).pixels) for seed in range(8)]
    with (
        serve("--max-queue", "16", "--request-timeout-ms", str(_DEADLINE_MS)) as server,
        httpx.Client(base_url=server.url, timeout=30, limits=_LIMITS) as client,
    ):
        masks = [_send(client, photo)[1] for photo in photos]
        result.capacity_per_s = _capacity(client, photos, min(5.0, seconds / 4))
        pace = result.capacity_per_s * overload
        _overload(server, client, photos, masks, seconds, pace, result)
        give_up = time.perf_counter() + 30
        while (left := _in_flight(server)) and time.perf_counter() < give_up:
            time.sleep(0.1)
        result.in_flight_after = left
    return result


def _send(client: httpx.Client, photo: bytes) -> tuple[str, bytes, float]:
    """Status, mask, milliseconds; the status is the error's name where there is no answer."""
    started = time.perf_counter()
    try:
        answer = client.post("/segment", content=photo)
    except httpx.HTTPError as error:
        return type(error).__name__, b"", 0.0
    return str(answer.status_code), answer.content, (time.perf_counter() - started) * 1000


def _capacity(client: httpx.Client, photos: list[bytes], seconds: float) -> float:
    end = time.perf_counter() + seconds

    def keep_sending(photo: bytes) -> int:
        count = 0
        while time.perf_counter() < end:
            count += _send(client, photo)[0] == "200"
        return count

    with ThreadPoolExecutor(8) as clients:
        return max(1.0, sum(clients.map(keep_sending, photos)) / seconds)


def _overload(
    server: ServerProcess,
    client: httpx.Client,
    photos: list[bytes],
    masks: list[bytes],
    seconds: float,
    requests_per_s: float,
    result: Soak,
) -> None:
    process = psutil.Process(server.process.pid)
    lock = threading.Lock()
    interval_s = 1 / requests_per_s
    started = time.perf_counter()

    def one(number: int) -> None:
        status, mask, taken_ms = _send(client, photos[number % len(photos)])
        with lock:
            result.statuses[status] += 1
            if status == "200":
                result.served_ms.append(taken_ms)
                result.mixed_up += mask != masks[number % len(photos)]

    number = 0
    with ThreadPoolExecutor(_CLIENTS) as clients:
        while (now := time.perf_counter() - started) < seconds:
            if now >= len(result.memory_mib):
                result.memory_mib.append(process.memory_info().rss / 2**20)
                result.files.append(process.num_fds())
                result.threads.append(process.num_threads())
            clients.submit(one, number)
            number += 1
            time.sleep(max(0.0, started + number * interval_s - time.perf_counter()))


def _in_flight(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("slsnet_requests_in_f"))


def _quantile(values: list[float] | list[int], q: float) -> float:
    return float(sorted(values)[min(len(values) - 1, int(len(values) * q))]) if values else 0.0


def main() -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    result = soak(given.minutes * 60)
    print(
        f"capacity {result.capacity_per_s:.1f}/s, 1.5 times that for {given.minutes:g} min:"
        f" {dict(result.statuses)}; served p50 {_quantile(result.served_ms, 0.5):.0f} ms,"
        f" p99 {_quantile(result.served_ms, 0.99):.0f} ms, deadline {_DEADLINE_MS} ms"
    )
    for name, values in (
        ("memory, MiB", result.memory_mib),
        ("files", result.files),
        ("threads", result.threads),
    ):
        tenth = max(1, len(values) // 10)
        print(f"{name}: {', '.join(f'{value:.0f}' for value in values[::tenth])}")
    faults = result.faults(0.03)
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
