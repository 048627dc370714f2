"""What a photo costs outside the network: `python -m benchmarks.path`.

It times a JPEG's bytes to the network's pixels, and the probability to a PNG of the photo's size,
in one thread and without a server. It compares that with the usual code, which decodes the whole
photo, enlarges the probability as floats and writes Pillow's default PNG. Both run in turn on the
same photo and probability. The table has medians of milliseconds by step, and the ratio of the
sums.

A second table shows the processor time that the queue takes for a photo, in all threads: from its
pixels to its own copy of the probability. The backend only copies, as one on a GPU does.

The photo is the largest of `--images`, resized, or a generated one (see `benchmarks.latency`).
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.latency import SIZES, largest, machine, photos_at_all_sizes
from common.onnx import onnx_runner
from common.program import Help
from common.stamp import Infer
from photos.image import MODEL_SIZE, THRESHOLD, encode_png, lesion_mask, read_photo
from server.backends import BackendInfo, Images
from server.inference.batching import Batcher
from server.observe.metrics import Metrics
from server.settings import SHIPPED_MODEL

STEPS = ("decode", "mask", "encode")
"""Bytes → network's pixels; network's probability → mask of the photo's size; mask → PNG."""

ARRIVALS = ((1, 1), (40, 1), (128, 1), (1, 64))
"""How photos come to the queue: number of clients, and photos in each client's request."""

_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Comparison:
    """Medians in milliseconds, by step, and both PNGs."""

    ours: dict[str, float]
    usual: dict[str, float]
    png: bytes
    usual_png: bytes

    @property
    def ratio(self) -> float:
        """How many times as long the usual way takes."""
        return sum(self.usual.values()) / sum(self.ours.values())


def compare(photo: bytes, infer: Infer, turns: int) -> Comparison:
    """Run both ways in turn, once more than `turns`. The first turn is not counted.

    Args:
        photo: bytes of a JPEG.
        infer: the network, whose own time is left out.
        turns: number of turns that the medians are of.
    """
    pixels = read_photo(photo).pixels
    probability = infer(pixels[None])[0]
    ways = (_ours, _usual)
    runs: dict[Any, list[dict[str, float]]] = {way: [] for way in ways}
    pngs = {}
    for turn in range(turns + 1):
        for way in ways if turn % 2 else reversed(ways):
            clock = _Clock()
            pngs[way] = way(photo, probability, clock.lap)
            if turn:
                runs[way].append(clock.milliseconds)
    ours, usual = (
        {step: statistics.median(run[step] for run in runs[way]) for step in STEPS} for way in ways
    )
    return Comparison(ours, usual, pngs[_ours], pngs[_usual])


class _Clock:
    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}
        self._lap = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.milliseconds[step] = (now - self._lap) * 1000
        self._lap = now


def _ours(data: bytes, probability: NDArray[np.float32], lap: Callable[[str], None]) -> bytes:
    photo = read_photo(data)
    lap("decode")
    packed = lesion_mask(probability, photo.width, photo.height, THRESHOLD)
    lap("mask")
    png = encode_png(packed, photo.width, photo.height)
    lap("encode")
    return png


def _usual(data: bytes, probability: NDArray[np.float32], lap: Callable[[str], None]) -> bytes:
    with Image.open(BytesIO(data)) as image:
        photo = image.convert("RGB")
    np.asarray(photo.resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BOX))
    lap("decode")
    enlarged = Image.fromarray(probability).resize(photo.size, Image.Resampling.BILINEAR)
    mask = (np.asarray(enlarged) > THRESHOLD).astype(np.uint8) * 255
    lap("mask")
    buffer = BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    lap("encode")
    return buffer.getvalue()


class Copies:
    """A backend that copies pixels to where a GPU would read them, and copies back a disc."""

    def __init__(self) -> None:
        self._pixels = np.zeros((_BUCKETS[-1], MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
        y, x = np.ogrid[:MODEL_SIZE, :MODEL_SIZE]
        disc = np.hypot(y - MODEL_SIZE / 2, x - MODEL_SIZE / 2) < MODEL_SIZE / 4
        self._probability = np.repeat(disc[None].astype(np.float32), _BUCKETS[-1], axis=0)

    def describe(self) -> BackendInfo:
        return BackendInfo("copies", "1", "cpu", "fp32", _BUCKETS[-1], slots=2, buckets=_BUCKETS)

    def warm_up(self) -> None: ...

    def infer(self, batch: Images) -> NDArray[np.float32]:
        for place, image in zip(self._pixels, batch, strict=False):
            place[...] = image
        return self._probability[: len(batch)].copy()

    def close(self) -> None: ...


async def queue_us(clients: int, photos: int, turns: int) -> float:
    """Microseconds of CPU time that a photo takes in the queue: the median over the turns.

    Args:
        clients: number of clients that wait for an answer at the same time.
        photos: number of photos in each client's request.
        turns: number of turns that the median is of; each has 20 requests of every client.
    """
    batcher = Batcher(Copies(), Metrics())
    images = [np.zeros((MODEL_SIZE, MODEL_SIZE, 3), np.uint8) for _ in range(photos)]
    deadline = time.perf_counter() + 3600

    async def client() -> None:
        for _ in range(20):
            await batcher.submit(images, deadline=deadline)

    taken = []
    for _ in range(turns + 1):
        started = time.process_time()
        await asyncio.gather(*(client() for _ in range(clients)))
        taken.append((time.process_time() - started) / (20 * clients * photos) * 1e6)
    await batcher.close()
    return statistics.median(taken[1:])


def _rows(size: tuple[int, int], comparison: Comparison) -> str:
    rows = []
    for name, steps in (("here", comparison.ours), ("usual", comparison.usual)):
        figures = " | ".join(f"{steps[step]:.2f}" for step in STEPS)
        rows.append(f"| {size[0]}×{size[1]} | {name} | {figures} | {sum(steps.values()):.2f} |")
    return f"{rows[0]} |\n{rows[1]} **{comparison.ratio:.1f}×** |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.path",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; the largest is taken")
    parser.add_argument(
        "--turns", type=int, default=9, help="turns that are measured, of each way and size"
    )
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="the network")
    options = parser.parse_args(arguments)
    image = largest(options.images) if options.images else None
    if options.images and image is None:
        parser.error(f"--images: {options.images} holds no .jpg")
    infer = onnx_runner(options.model)
    photos = photos_at_all_sizes(image)
    print(f"Photos: {f'the largest in {image.parent}, resized' if image else 'generated'}.")
    print(f"Machine: {machine()}. Milliseconds, p50 of {options.turns}.\n")
    print(f"| photo | way | {' | '.join(STEPS)} | all | ratio |")
    print("|---|---" + "|--:" * (len(STEPS) + 2) + "|")
    for size in SIZES:
        print(_rows(size, compare(photos[size], infer, options.turns)), flush=True)
    print("\n| clients | photos in a request | queue, µs of CPU a photo |\n|--:|--:|--:|")
    for clients, together in ARRIVALS:
        taken_us = asyncio.run(queue_us(clients, together, options.turns))
        print(f"| {clients} | {together} | {taken_us:.0f} |", flush=True)


if __name__ == "__main__":
    main()
