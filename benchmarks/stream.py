"""Frames a second over WebSockets, beside the same frames over HTTP: `python -m benchmarks.stream`.

It starts a real server. 1, 4 and 16 clients send frames of a camera's size, each the next one when
its last is answered, and in a third way (`2 in flight`) one frame ahead, as the page does. The ways
take turns, several times. For each number of clients the table has:

- frames a second of all clients, and their ratio to those of HTTP (the median of the rounds')
- p50 and p99 of the time from sending a frame to its mask
- CPU time of the server a frame, and its ratio to that of HTTP

Masks come as run lengths, both ways. Frames are the photos of `--images` (default: SLSNET_DATA's
native ones) at `--size`, or generated ones. Clients and server share the cores: look at ratios.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BytesIO
from pathlib import Path

import numpy as np
import uvloop
from PIL import Image

from benchmarks.latency import JPEG_QUALITY, machine
from benchmarks.peers.client import Connection, post
from common.program import Help
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import lesion_photo

CLIENTS = (1, 4, 16)

WAYS = ("HTTP", "stream", "stream, 2 in flight")

_FRAMES = 12


@dataclass
class Figures:
    """What one way did with one number of clients."""

    per_s: list[float] = field(default_factory=list)
    """Frames a second, by round."""
    cpu_ms: list[float] = field(default_factory=list)
    """Milliseconds of the server's CPU time for a frame, by round."""
    seconds: list[float] = field(default_factory=list)
    """From sending a frame to its mask, of all rounds."""
    failed: int = 0
    """Frames without a mask."""


def frames_of(images: Path | None, size: tuple[int, int]) -> list[bytes]:
    """JPEGs of this width and height, of photos in the folder or generated."""
    files = sorted(images.glob("*.jpg"))[:_FRAMES] if images else []
    pictures = [Image.open(file).convert("RGB").resize(size) for file in files] or [
        Image.fromarray(lesion_photo(seed, *size).pixels) for seed in range(_FRAMES)
    ]
    frames = []
    for picture in pictures:
        out = BytesIO()
        picture.save(out, "JPEG", quality=JPEG_QUALITY)
        frames.append(out.getvalue())
    return frames


def measure(
    server: ServerProcess,
    frames: Sequence[bytes],
    clients: int,
    *,
    rounds: int,
    seconds: float,
) -> dict[str, Figures]:
    """Let the ways take turns.

    Args:
        server: a running one.
        frames: sent in turn.
        clients: number of clients.
        rounds: number of turns of each way.
        seconds: length of each.
    """
    found = {way: Figures() for way in WAYS}
    for turn in range(rounds):
        for way in WAYS if turn % 2 else reversed(WAYS):
            before, started = server.cpu_s(), time.perf_counter()
            answered, failed = uvloop.run(_run(way, server, frames, clients, seconds))
            wall_s = time.perf_counter() - started
            figures = found[way]
            figures.per_s.append(len(answered) / wall_s)
            figures.cpu_ms.append(1000 * (server.cpu_s() - before) / max(1, len(answered)))
            figures.seconds += answered
            figures.failed += failed
    return found


async def _run(
    way: str, server: ServerProcess, frames: Sequence[bytes], clients: int, seconds: float
) -> tuple[list[float], int]:
    """Seconds of the frames that got a mask, and the number of those that got none."""
    if way == "HTTP":
        return await _requests(server, frames, clients, seconds)
    return await _streams(server, frames, clients, 2 if "2" in way else 1, seconds)


async def _requests(
    server: ServerProcess, frames: Sequence[bytes], clients: int, seconds: float
) -> tuple[list[float], int]:
    headers = {"Content-Type": "image/jpeg"}
    requests = [post("/segment/json?mask=rle", frame, headers) for frame in frames]
    answered: list[float] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        connection = await Connection.open(server.port)
        for request in itertools.cycle(requests):
            sent = time.perf_counter()
            reply = await connection.ask(request)
            if reply.status == HTTPStatus.OK:
                answered.append(time.perf_counter() - sent)
            else:
                failed += 1
            if time.perf_counter() >= until or not connection.is_open:
                break
        connection.close()

    until = time.perf_counter() + seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    return answered, failed


async def _streams(
    server: ServerProcess, frames: Sequence[bytes], clients: int, in_flight: int, seconds: float
) -> tuple[list[float], int]:
    from websockets.asyncio.client import connect

    answered: list[float] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        url = f"ws://127.0.0.1:{server.port}/stream?mask=rle&deadline_ms=30000"
        async with connect(url, compression=None, proxy=None, max_size=None) as socket:
            await socket.recv()
            sent: dict[int, float] = {}
            last = 0

            async def send() -> None:
                nonlocal last
                last += 1
                sent[last] = time.perf_counter()
                await socket.send(frames[last % len(frames)])

            for _ in range(in_flight):
                await send()
            while sent:
                message = json.loads(await socket.recv())
                taken = sent.pop(message["frame"])
                for older in [number for number in sent if number < message["frame"]]:
                    del sent[older]
                if message["type"] == "mask":
                    answered.append(time.perf_counter() - taken)
                else:
                    failed += 1
                while len(sent) < in_flight and time.perf_counter() < until:
                    await send()

    until = time.perf_counter() + seconds
    await asyncio.gather(*(client() for _ in range(clients)))
    return answered, failed


def table(clients: int, found: dict[str, Figures]) -> list[str]:
    """Lines of Markdown for one number of clients."""
    lines = []
    base = found[WAYS[0]]
    for way, figures in found.items():
        p50, p99 = (1000 * np.quantile(figures.seconds, share) for share in (0.5, 0.99))
        lines.append(
            f"| {clients} | {way} | {statistics.median(figures.per_s):.1f}"
            f" | {_ratio(figures.per_s, base.per_s):.2f} | {p50:.0f} | {p99:.0f}"
            f" | {statistics.median(figures.cpu_ms):.1f}"
            f" | {_ratio(figures.cpu_ms, base.cpu_ms):.2f} | {figures.failed} |"
        )
    return lines


def _ratio(figures: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(figures, base, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    data = Path(os.environ.get("SLSNET_DATA", "../shared/data")) / "native"
    parser = argparse.ArgumentParser(
        formatter_class=Help,
        prog="python -m benchmarks.stream",
        description=__doc__,
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        default=data if data.is_dir() else None,
        help="folder of photos (default: SLSNET_DATA's native ones, or generated ones)",
    )
    parser.add_argument(
        "--size", default="640x480", help="width x height of a frame, pixels (default: 640x480)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a turn (default: 4)")
    options = parser.parse_args(arguments)
    width, height = (int(side) for side in options.size.split("x"))
    frames = frames_of(options.images, (width, height))
    print(f"{machine()}; {width}×{height}, {statistics.mean(map(len, frames)) / 1000:.0f} kB\n")
    print("| clients | way | frames/s | × HTTP | p50, ms | p99, ms | CPU, ms | × HTTP | failed |")
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    with serve() as server:
        for clients in CLIENTS:
            found = measure(server, frames, clients, rounds=options.rounds, seconds=options.seconds)
            print("\n".join(table(clients, found)), flush=True)


if __name__ == "__main__":
    main()
