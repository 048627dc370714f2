"""What a photo costs between feeders and the owner of their network: `python -m benchmarks.ring`.

Real processes without HTTP: each feeder's clients send a photo's pixels again as soon as they have
the probability, and the owner's backend only copies, as one on a GPU does. One process that does
both stands beside them. The Markdown table has the medians of the rounds: photos/s of all feeders
together, the photos in a run, and the CPU time of a photo on either side. An owner has one event
loop, so that 1 s divided by the loop's part is the most that it can do; the copies of its backend
run beside it.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from benchmarks.latency import machine
from benchmarks.path import Copies
from common.program import Help
from common.tables import markdown
from photos.image import MODEL_SIZE
from server.inference.service import Service
from server.inference.sharing.feeder import Address, Link
from server.inference.sharing.memory import Slots, new_memory
from server.inference.sharing.owner import SharedService
from server.observe.metrics import Metrics
from server.settings import Settings

_FEEDERS = (0, 1, 2, 4)
"""Numbers of feeders; 0 is one process that runs the network itself."""


_HEAD = (
    "feeders",
    "photos/s",
    "photos in a run",
    "feeder, µs of CPU a photo",
    "owner",
    "its loop",
    "photos/s of one loop",
)


@dataclass(frozen=True)
class Part:
    """What feeders and owner did in one round."""

    photos_per_s: float
    photos_a_run: float
    feeder_us: float
    """CPU time of a photo in a feeder, or in the one process; in microseconds."""
    owner_us: float
    """The same in the owner, in all threads; 0 where there is none."""
    loop_us: float
    """The part of the owner's event loop, or of the one process'."""


async def _feed(service: Service, clients: int, seconds: float) -> dict[str, float]:
    """Send photos for so long; return what was done."""
    while not service.is_ready:  # noqa: ASYNC110  # another task makes it so
        await asyncio.sleep(0.01)
    pixels = np.zeros((MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
    photos, runs = 0, 0.0
    end = float("inf")

    async def client() -> None:
        nonlocal photos, runs
        while time.perf_counter() < end:
            (answer,), _ = await service.networks.default.infer(
                [pixels], deadline=end + 60, is_gone=lambda: False, bulk=False
            )
            photos += 1
            runs += 1 / answer.batch_size

    started, used, in_loop = time.perf_counter(), time.process_time(), time.thread_time()
    end = started + seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    taken = time.perf_counter() - started
    return {
        "photos": photos,
        "runs": runs,
        "seconds": taken,
        "cpu_s": time.process_time() - used,
        "loop_s": time.thread_time() - in_loop,
    }


async def _alone(clients: int, seconds: float) -> dict[str, float]:
    service = Service(Settings(), Metrics())
    await service.use(Copies())
    done = await _feed(service, clients, seconds)
    await service.close()
    return done


async def _feeder(address: str, clients: int, seconds: float) -> dict[str, float]:
    service = Service(Settings(), Metrics())
    link = Link(service, Address.parse(address))
    await link.start()
    done = await _feed(service, clients, seconds)
    await link.close()
    await service.close()
    return done


async def _owner(listener: int, memories: Sequence[int]) -> dict[str, float]:
    """Run photos from the first feeder's coming to the last one's leaving."""
    service = SharedService(Settings(), Metrics(), [Slots(memory) for memory in memories])
    await service.use(Copies())
    await asyncio.get_running_loop().create_server(
        service.listen, sock=socket.socket(fileno=listener)
    )
    used, in_loop = time.process_time(), time.thread_time()
    await asyncio.to_thread(sys.stdin.read)
    await service.deserted()
    return {"cpu_s": time.process_time() - used, "loop_s": time.thread_time() - in_loop}


def _start(*arguments: str, files: Sequence[int] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.ring", *arguments],
        pass_fds=files,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _told(process: "subprocess.Popen[str]") -> dict[str, float]:
    told, _ = process.communicate(timeout=120)
    result: dict[str, float] = json.loads(told)
    return result


def measure(feeders: int, clients: int, seconds: float) -> Part:
    """Run so many feeders with as many clients together."""
    if not feeders:
        parts = [_told(_start("--alone", "--clients", str(clients), "--seconds", str(seconds)))]
        return _part(parts, {"cpu_s": 0.0, "loop_s": parts[0]["loop_s"]})
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/network"
        listener.bind(path)
        listener.listen(feeders)
        memories = [new_memory() for _ in range(feeders)]
        way = listener.fileno()
        told = ",".join(map(str, [way, *memories]))
        owner = _start("--owner", told, files=[way, *memories])
        each = ["--clients", str(clients // feeders), "--seconds", str(seconds)]
        running = [
            _start("--feeder", str(Address(path, memory, number)), *each, files=[memory])
            for number, memory in enumerate(memories)
        ]
        parts = [_told(feeder) for feeder in running]
        owned = _told(owner)
        for memory in memories:
            os.close(memory)
    return _part(parts, owned)


def _part(parts: Sequence[dict[str, float]], owner: dict[str, float]) -> Part:
    photos = sum(part["photos"] for part in parts)
    return Part(
        sum(part["photos"] / part["seconds"] for part in parts),
        photos / sum(part["runs"] for part in parts),
        sum(part["cpu_s"] for part in parts) / photos * 1e6,
        owner["cpu_s"] / photos * 1e6,
        owner["loop_s"] / photos * 1e6,
    )


def table(rounds: dict[int, list[Part]]) -> str:
    """The medians as a Markdown table."""
    rows = []
    for feeders, parts in rounds.items():
        per_s, together, feeder_us, owner_us, loop_us = (
            statistics.median(getattr(part, field.name) for part in parts) for field in fields(Part)
        )
        rows.append(
            (
                str(feeders or "one process"),
                f"{per_s:,.0f}",
                f"{together:.0f}",
                f"{feeder_us:.0f}",
                f"{owner_us:.0f}" if feeders else "–",
                f"{loop_us:.0f}",
                f"{1e6 / loop_us:,.0f}",
            )
        )
    return markdown(_HEAD, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ring", description=__doc__, formatter_class=Help
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of each number of feeders, in turn"
    )
    parser.add_argument("--seconds", type=float, default=3, help="length of a round")
    parser.add_argument("--clients", type=int, default=128, help="clients of all feeders together")
    for part in ("--feeder", "--owner"):
        parser.add_argument(part, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.feeder:
        print(json.dumps(asyncio.run(_feeder(options.feeder, options.clients, options.seconds))))
    elif options.owner:
        listener, *memories = map(int, options.owner.split(","))
        print(json.dumps(asyncio.run(_owner(listener, memories))))
    elif options.alone:
        print(json.dumps(asyncio.run(_alone(options.clients, options.seconds))))
    else:
        rounds: dict[int, list[Part]] = defaultdict(list)
        for _ in range(options.rounds):
            for feeders in _FEEDERS:
                rounds[feeders].append(measure(feeders, options.clients, options.seconds))
        print(f"Machine: {machine()}. {options.clients} clients.\n")
        print(table(rounds))


if __name__ == "__main__":
    main()
