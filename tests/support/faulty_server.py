"""`python -m tests.support.faulty_server FLAGS…`: a server whose network fails now and then."""

import itertools
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from server.__main__ import main
from server.backends import Backend, BackendError, BackendInfo, Images, open_backend
from server.inference import loading

POISON = (255, 0, 255)
"""A batch with a photo of nothing but this colour always fails."""

ENDLESS = (0, 255, 255)
"""A batch with a photo of nothing but this colour never returns."""

EVERY = 7
"""Each seventh batch fails, once."""


class Faulty:
    """The real network, with faults. A batch that is run again after a fault is not counted."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._batches = itertools.count(1)
        self._again: set[bytes] = set()

    def describe(self) -> BackendInfo:
        return self._backend.describe()

    def warm_up(self) -> None:
        self._backend.warm_up()

    def infer(self, batch: Images) -> NDArray[np.float32]:
        batch = np.asarray(batch)
        if len(batch) == 1 and batch.tobytes() in self._again:
            self._again.remove(batch.tobytes())
        # Blank images at the start do not count: there are as many as the machine has cores.
        elif batch.any() and next(self._batches) % EVERY == 0:
            self._again |= {image.tobytes() for image in batch}
            raise BackendError("one in seven")
        if (batch == POISON).all((1, 2, 3)).any():
            self._again |= {image.tobytes() for image in batch}
            raise BackendError("poisoned")
        if (batch == ENDLESS).all((1, 2, 3)).any():
            threading.Event().wait()
        return self._backend.infer(batch)

    def close(self) -> None:
        self._backend.close()


def _open(name: str, model: Path, **options: Any) -> Backend:
    return Faulty(open_backend(name, model, **options))


if __name__ == "__main__":
    with mock.patch.object(loading, "open_backend", _open):
        sys.exit(main())
