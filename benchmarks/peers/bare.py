"""The network in a loop, no server: `python -m benchmarks.peers.bare SECONDS FLAGS`.

It takes the server's flags, and runs the network as the server does: in as many processes, from
as many threads at a time. With `--stock` it runs ONNX Runtime with its own defaults in one process.
It prints images a second by batch size, as JSON.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.cpu_engine import stock
from common.stamp import Infer
from photos.image import MODEL_SIZE
from server.backends import open_backend
from server.settings import Settings, read_settings

_STOCK_BATCHES = (1, 8)


def per_second(infer: Infer, slots: int, batch: int, seconds: float) -> float:
    """Images a second, from `slots` threads."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
    infer(pixels)
    started = time.perf_counter()

    def loop(_slot: int) -> int:
        runs = 0
        while time.perf_counter() < started + seconds:
            infer(pixels)
            runs += 1
        return runs

    with ThreadPoolExecutor(slots) as threads:
        runs = sum(threads.map(loop, range(slots)))
    return batch * runs / (time.perf_counter() - started)


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Images a second of one process, by batch size."""
    threads = settings.threads or settings.cores
    backend = open_backend(settings.backend, settings.model, threads=threads)
    backend.warm_up()
    about = backend.describe()
    batches = sorted({1, settings.max_batch or about.max_batch})
    return {str(batch): per_second(backend.infer, about.slots, batch, seconds) for batch in batches}


def measure_stock(settings: Settings, seconds: float) -> dict[str, float]:
    """Images a second of stock ONNX Runtime with as many threads, by batch size."""
    infer = stock(settings.model, settings.threads or settings.cores)
    return {str(batch): per_second(infer, 1, batch, seconds) for batch in _STOCK_BATCHES}


def main() -> None:
    """Print the sum over all processes."""
    seconds, flags = float(sys.argv[1]), sys.argv[2:]
    settings = read_settings([flag for flag in flags if flag not in ("--one", "--stock")])
    if "--stock" in flags:
        print(json.dumps(measure_stock(settings, seconds)))
        return
    if settings.workers == 1 or "--one" in flags:
        print(json.dumps(measure(settings, seconds)))
        return
    command = [sys.executable, "-m", "benchmarks.peers.bare", str(seconds), *flags, "--one"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(settings.workers)]
    found = [json.loads(worker.communicate()[0]) for worker in workers]
    print(json.dumps({batch: sum(one[batch] for one in found) for batch in found[0]}))


if __name__ == "__main__":
    main()
