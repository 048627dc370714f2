"""Backends that a test can tell what to do."""

import time

import numpy as np
from numpy.typing import NDArray

from server.backends import BackendInfo, Images


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
