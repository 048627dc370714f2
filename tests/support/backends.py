"""Backends that a test can tell what to do."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from server.backends import BackendError, BackendInfo, Images

POISON = 255
"""A batch with an image of this value fails in a `Held`."""


class Held:
    """Answers each image with its own first value, when it is let."""

    def __init__(self, info: BackendInfo, wait: Callable[[], bool]) -> None:
        """Each batch calls `wait`, which returns once it may end; False means never."""
        self.info = info
        self._wait = wait
        self.batches: list[list[int]] = []
        self.closed = False

    def describe(self) -> BackendInfo:
        return self.info

    def warm_up(self) -> None:
        pass

    def infer(self, batch: Images) -> NDArray[np.float32]:
        values = [int(image[0, 0, 0]) for image in batch]
        self.batches.append(values)
        assert self._wait()
        assert not self.closed
        if POISON in values:
            raise BackendError("poisoned")
        return np.stack([np.full((128, 128), value / 255, np.float32) for value in values])

    def close(self) -> None:
        self.closed = True


class Constant:
    """A backend that says one probability, slowly, and fails once it is closed."""

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.closed = False
        self.warm = False

    def describe(self) -> BackendInfo:
        version = str(self.probability)
        return BackendInfo("constant", version, "cpu", "fp32", 4, model={"version": version})

    def warm_up(self) -> None:
        self.warm = True

    def infer(self, batch: Images) -> NDArray[np.float32]:
        # So that requests of one network are under way when the next takes over.
        time.sleep(0.01)
        assert self.warm
        assert not self.closed
        return np.full((len(batch), 128, 128), self.probability, np.float32)

    def close(self) -> None:
        self.closed = True
