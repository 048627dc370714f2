"""What the backends of the CPU share: how photos share the threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo, Images

__all__ = ["CpuBackend", "Run", "slots_for"]

# Each run takes memory of its own: about 80 MiB with exact attention.
_MOST_TOGETHER = 8

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Runs one image, uint8 `[1, 128, 128, 3]` → probability, float32 `[1, 128, 128]`."""


class CpuBackend:
    """A backend of the CPU that takes photos one by one.

    A lone photo runs on all threads. Photos that come together run on one thread each, which does
    more in all: threads that share a photo wait for each other after every layer.

    Args:
        library: its name, for messages.
        info: the description; its `slots` is how many photos run together at most.
        alone: runs a photo on all threads; never asked by two threads at a time.
        beside: runs a photo on one thread, beside others.
    """

    def __init__(self, library: str, info: BackendInfo, alone: Run, beside: Run) -> None:
        self._library = library
        self._info = info
        self._alone = alone
        self._beside = beside
        self._running = 0
        self._lock = threading.Lock()

    def describe(self) -> BackendInfo:
        return self._info

    def warm_up(self) -> None:
        # Run as many as ever run together, so that all memory is taken now.
        image = np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
        with ThreadPoolExecutor(self._info.slots) as threads:
            list(threads.map(self.infer, [image] * self._info.slots))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        with self._lock:
            run = self._beside if self._running else self._alone
            self._running += 1
        try:
            return np.concatenate([run(image[None]) for image in batch])
        except Exception as error:
            raise BackendError(
                f"{self._library} failed on a batch of {len(batch)}: {error}"
            ) from error
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        del self._alone, self._beside


def slots_for(threads: int) -> int:
    """How many photos run together where there are as many threads."""
    return min(threads, _MOST_TOGETHER)
