"""A long run at more than the server's throughput: nothing may grow, no request may be lost.

    python -m benchmarks.soak --minutes 30

It sends photos of many sizes and formats, one in eight as bulk, at 1.5 times the rate at which the
server answers, from clients that do not wait for each other. The rate is measured all the time, so
that the load stays right while other work on the machine comes and goes. It passes if nearly all
admitted requests were served within their deadline and the others refused with 429, no answer is
missing, every mask is its own photo's, and memory, files and threads stay as they were. `--output`
gets soak.json and soak.md.
"""

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import psutil

from benchmarks.deck import Card, deal, generated
from benchmarks.percentiles import percentile
from common.program import Help
from server.settings import Settings
from tests.support.launch import ServerProcess, serve

DEADLINE_MS = 2000
BULK_DEADLINE_MS = 10_000
OVERLOAD = 1.5

CLIENTS = 128
_LIMITS = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
_BULK_SHARE = 8

# Memory, files and threads settle in the first part, but in no more than the first minutes.
_SETTLING = 0.25
_SETTLING_S = 180.0

# Files, and threads, may be so many more at the end.
_GROWTH = 2

# Parts of the rest, whose medians are compared: single seconds differ by what is decoded.
_PARTS = 9

# The load follows the best of the last rates, each measured over a few seconds. Following the last
# one alone, the load would drop with every dip.
_PACE_S = 5.0
_PACES = 30

# So much of what was admitted may miss its deadline, as the machine's speed varies.
_LATE = 0.01


@dataclass
class Soak:
    """The observations of a run."""

    seconds: float = 0
    pace_per_s: list[float] = field(default_factory=list)
    """Answers in each second."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Number of answers by status, or by the error's name where there was no answer."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Number of 429s, with and without Retry-After."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Number of masks by verdict."""
    served_ms: list[float] = field(default_factory=list)
    """Time from a request's head to its answer, by the server's clock; bulk is apart."""
    bulk_ms: list[float] = field(default_factory=list)
    client_ms: list[float] = field(default_factory=list)
    """The same times as `served_ms`, by the client's clock."""
    memory_mib: list[float] = field(default_factory=list)
    """The server's memory in each second; the lists below are by the second too."""
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    in_flight_after: float = 0
    sockets_left: int = 0
    """How many more sockets there are than before the load, once the clients are gone."""

    @property
    def late(self) -> float:
        """Share of the admitted requests that missed their deadline."""
        admitted = self.statuses["200"] + self.statuses["504"]
        return self.statuses["504"] / admitted if admitted else 0.0

    @property
    def p99_ms(self) -> float:
        """The p99 of the served requests by the server's clock, without bulk."""
        return percentile(self.served_ms, 0.99)

    def settled(self, values: Sequence[float]) -> list[float]:
        """Medians of the parts that follow the first minutes."""
        start = round(min(len(values) * _SETTLING, _SETTLING_S))
        rest = values[start:]
        edges = [len(rest) * part // _PARTS for part in range(_PARTS + 1)]
        return [statistics.median(rest[a:b]) for a, b in pairwise(edges) if a < b]

    def memory_band(self) -> float:
        """Largest distance of a part's memory from the parts' median, as a fraction of it."""
        parts = self.settled(self.memory_mib)
        middle = statistics.median(parts)
        return max(abs(part - middle) for part in parts) / middle

    def faults(self, *, memory: float = 0.03, timely: bool = True) -> list[str]:
        """The faults of the run; none if it passes.

        Args:
            memory: how far memory may be from its median once it has settled, as a fraction.
            timely: deadlines count. They depend on the machine, and on what else it does.
        """
        faults = []
        if lost := {n: count for n, count in self.statuses.items() if n not in _ALLOWED}:
            faults.append(f"answers that are no answers: {lost}")
        if not self.statuses["200"] or not self.statuses["429"]:
            faults.append(f"not served and refused both: {dict(self.statuses)}")
        if self.refusals["without Retry-After"]:
            faults.append("a refusal that does not say when to come back")
        if self.verdicts["wrong"]:
            faults.append(f"{self.verdicts['wrong']} masks are not their photo's")
        faults += self._late() if timely else []
        if self.memory_band() > memory:
            faults.append(f"memory is not flat: ±{self.memory_band():.1%}")
        for name, values in (("files", self.files), ("threads", self.threads)):
            parts = self.settled(values)
            if parts[-1] > parts[0] + _GROWTH:
                faults.append(f"{name} grew from {parts[0]:g} to {parts[-1]:g}")
        if self.in_flight_after:
            faults.append(f"{self.in_flight_after:g} requests are still in flight")
        if self.sockets_left > 0:
            faults.append(f"{self.sockets_left} connections are left")
        return faults

    def _late(self) -> list[str]:
        faults = []
        if self.late > _LATE:
            faults.append(f"{self.late:.1%} of what was let in missed its deadline")
        if self.p99_ms > DEADLINE_MS:
            faults.append(f"p99 {self.p99_ms:.0f} ms")
        if percentile(self.bulk_ms, 0.99) > BULK_DEADLINE_MS:
            faults.append(f"p99 of bulk {percentile(self.bulk_ms, 0.99):.0f} ms")
        return faults

    def markdown(self) -> str:
        """The result as a Markdown table."""
        sent = self.statuses.total()
        parts = self.settled(self.memory_mib)
        rows = [
            ("length", f"{self.seconds / 60:.1f} min at {OVERLOAD:g} × what is served"),
            ("requests", f"{sent}, {sent / self.seconds:.1f}/s; one in {_BULK_SHARE} bulk"),
            (
                "served",
                f"{self.statuses['200']}, {self.statuses['200'] / self.seconds:.1f}/s;"
                f" {len(self.bulk_ms)} of them bulk",
            ),
            ("refused with 429", f"{self.statuses['429']}, all with Retry-After"),
            ("let in, but late (504)", f"{self.statuses['504']}, {self.late:.2%} of those let in"),
            ("lost", f"{sum(n for s, n in self.statuses.items() if s not in _ALLOWED)}"),
            ("masks of another photo", f"{self.verdicts['wrong']}"),
            (f"served within (deadline {DEADLINE_MS} ms)", _times(self.served_ms)),
            ("the same by the client's clock", _times(self.client_ms)),
            (f"bulk served within (deadline {BULK_DEADLINE_MS} ms)", _times(self.bulk_ms)),
            (
                "memory after the first minutes",
                f"{min(parts):.0f} to {max(parts):.0f} MiB (±{self.memory_band():.1%});"
                f" most ever {max(self.memory_mib):.0f}",
            ),
            ("open files", _range(self.settled(self.files))),
            ("threads", _range(self.settled(self.threads))),
        ]
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


_ALLOWED = ("200", "429", "504")


def soak(seconds: float, overload: float = OVERLOAD) -> Soak:
    """Start a server, and send `overload` times its throughput for so long."""
    result = Soak(seconds)
    cards = generated(Settings().model).cards
    flags = ("--request-timeout-ms", str(BULK_DEADLINE_MS), "--log-level", "warning")
    with serve(*flags) as server:
        process = psutil.Process(server.process.pid)
        _, sockets_before = _count_files(process)
        with httpx.Client(base_url=server.url, timeout=30, limits=_LIMITS) as client:
            _Load(server, client, cards, result).run(seconds, overload)
        give_up = time.perf_counter() + 30
        while (left := _in_flight(server)) and time.perf_counter() < give_up:
            time.sleep(0.1)
        result.in_flight_after = left
        while True:
            result.sockets_left = max(0, _count_files(process)[1] - sockets_before)
            if not result.sockets_left or time.perf_counter() > give_up:
                break
            time.sleep(0.1)
    return result


class _Load:
    """Sends photos from clients that do not wait for each other."""

    def __init__(
        self, server: ServerProcess, client: httpx.Client, cards: Sequence[Card], result: Soak
    ) -> None:
        self._process = psutil.Process(server.process.pid)
        self._client = client
        self._cards = cards
        self._result = result
        self._precision = client.get("/model").json()["backend"]["precision"]
        self._lock = threading.Lock()
        self._served: deque[float] = deque()
        self._paces: deque[float] = deque([1.0], maxlen=_PACES)

    def run(self, seconds: float, overload: float) -> None:
        self._closed_loop(min(5.0, seconds / 8))
        started = due = time.perf_counter()
        number = 0
        with ThreadPoolExecutor(CLIENTS) as clients:
            for card in deal(self._cards):
                now = time.perf_counter()
                if now - started > seconds:
                    break
                if now - started >= len(self._result.memory_mib):
                    self._look()
                number += 1
                clients.submit(self._send, card, bulk=number % _BULK_SHARE == 0)
                due += 1 / (overload * max(self._paces))
                time.sleep(max(0.0, due - time.perf_counter()))
                # Photos that this thread missed while it had no core are not sent in a burst.
                due = max(due, time.perf_counter() - 1)

    def _closed_loop(self, seconds: float) -> None:
        """Run clients that wait for each answer, to find a first rate."""
        started = time.perf_counter()

        def keep_sending(card: Card) -> int:
            count = 0
            while time.perf_counter() < started + seconds:
                answer = self._client.post("/segment", content=card.body, headers=_headers(card))
                count += answer.status_code == 200
            return count

        with ThreadPoolExecutor(4) as clients:
            count = sum(clients.map(keep_sending, self._cards[::6]))
        self._paces.append(count / (time.perf_counter() - started))

    def _look(self) -> None:
        """Record memory, files and threads. This runs once a second."""
        result = self._result
        with self._process.oneshot():
            result.memory_mib.append(self._process.memory_info().rss / 2**20)
            result.threads.append(self._process.num_threads())
        # Connections come and go with the load. None may be left at the end.
        files, _ = _count_files(self._process)
        result.files.append(files)
        now = time.perf_counter()
        with self._lock:
            while self._served and self._served[0] < now - _PACE_S:
                self._served.popleft()
            pace = len(self._served) / _PACE_S
        if len(result.memory_mib) > _PACE_S:
            self._paces.append(pace)
        result.pace_per_s.append(pace)

    def _send(self, card: Card, *, bulk: bool) -> None:
        asked = {"Priority": "bulk"} if bulk else {"X-Request-Timeout-Ms": str(DEADLINE_MS)}
        headers = _headers(card) | asked
        sent = time.perf_counter()
        try:
            answer = self._client.post("/segment", content=card.body, headers=headers)
        except httpx.HTTPError as error:
            with self._lock:
                self._result.statuses[type(error).__name__] += 1
            return
        came = time.perf_counter()
        result = self._result
        with self._lock:
            result.statuses[str(answer.status_code)] += 1
            if answer.status_code == 200:
                self._served.append(came)
                if bulk:
                    result.bulk_ms.append(_total_ms(answer))
                else:
                    result.served_ms.append(_total_ms(answer))
                    result.client_ms.append((came - sent) * 1000)
                result.verdicts[card.expected.verdict(answer.content, self._precision)] += 1
            elif answer.status_code == 429:
                has = "with" if "retry-after" in answer.headers else "without"
                result.refusals[f"{has} Retry-After"] += 1


def _headers(card: Card) -> dict[str, str]:
    return {"Content-Type": card.content_type}


def _total_ms(answer: httpx.Response) -> float:
    """The whole time in `Server-Timing`."""
    return float(answer.headers["server-timing"].rpartition("total;dur=")[2])


def _count_files(process: psutil.Process) -> tuple[int, int]:
    """Number of open files that are not sockets, and of sockets."""
    files = sockets = 0
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()).startswith("socket:"):
                sockets += 1
            else:
                files += 1
    return files, sockets


def _in_flight(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("slsnet_requests_in_f"))


def _times(milliseconds: Sequence[float]) -> str:
    p50, p99 = (percentile(milliseconds, q) for q in (0.5, 0.99))
    return f"p50 {p50:.0f}, p99 {p99:.0f}, worst {max(milliseconds, default=0):.0f} ms"


def _range(parts: Sequence[float]) -> str:
    return f"{min(parts):g} to {max(parts):g}"


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        formatter_class=Help, prog="python -m benchmarks.soak", description=__doc__
    )
    parser.add_argument("--minutes", type=float, default=30, help="how long it runs")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder for the report"
    )
    given = parser.parse_args()
    result = soak(given.minutes * 60)
    faults = result.faults()
    given.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "seconds": result.seconds,
        "statuses": result.statuses,
        "verdicts": result.verdicts,
        "p99_ms": result.p99_ms,
        "late": result.late,
        "memory_mib": [round(value, 1) for value in result.memory_mib],
        "files": result.files,
        "threads": result.threads,
        "pace_per_s": result.pace_per_s,
        "faults": faults,
    }
    (given.output / "soak.json").write_text(json.dumps(figures), encoding="utf-8")
    (given.output / "soak.md").write_text(result.markdown() + "\n", encoding="utf-8")
    print(result.markdown())
    print("\n".join(f"FAULT: {fault}" for fault in faults) or "passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
