"""The network in a loop, no server: `python -m benchmarks.peers.bare SECONDS FLAGS`.

Takes the server's flags and runs what they choose as the server does: in as many processes, from as
many threads at a time. Prints images a second by batch size, as JSON.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model.image import MODEL_SIZE
from server.backends import Backend, open_backend
from server.settings import Settings, read_settings


def per_second(backend: Backend, batch: int, seconds: float) -> float:
    """Images a second, from as many threads as the backend wants."""
    slots = backend.describe().slots
    pixels = np.random.default_rng(0).integers(0, 256, (batch, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
    backend.infer(pixels)
    started = time.perf_counter()

    def loop(_slot: int) -> int:
        runs = 0
        while time.perf_counter() < started + seconds:
            backend.infer(pixels)
            runs += 1
        return runs

    with ThreadPoolExecutor(slots) as threads:
        runs = sum(threads.map(loop, range(slots)))
    return batch * runs / (time.perf_counter() - started)


def measure(settings: Settings, seconds: float) -> dict[str, float]:
    """Of one process."""
    threads = settings.threads or settings.cores
    backend = open_backend(settings.backend, settings.model, threads=threads)
    backend.warm_up()
    batches = sorted({1, settings.max_batch or backend.describe().max_batch})
    return {str(batch): per_second(backend, batch, seconds) for batch in batches}


def main() -> None:
    """Print the sum over all processes."""
    seconds, flags = float(sys.argv[1]), sys.argv[2:]
    settings = read_settings([flag for flag in flags if flag != "--one"])
    if settings.workers == 1 or "--one" in flags:
        print(json.dumps(measure(settings, seconds)))
        return
    command = [sys.executable, "-m", "benchmarks.peers.bare", str(seconds), *flags, "--one"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(settings.workers)]
    found = [json.loads(worker.communicate()[0]) for worker in workers]
    print(json.dumps({batch: sum(one[batch] for one in found) for batch in found[0]}))


if __name__ == "__main__":
    main()
