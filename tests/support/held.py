"""A server whose network stands still for as long as a test wants, so that others wait for it.

Run as `python -m tests.support.held LOCK FLAGS…`: each inference waits for the lock on that file.
"""

import contextlib
import fcntl
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from server.__main__ import main
from server.backends import Backend, BackendInfo, Images, open_backend
from server.inference import batching, loading
from tests.support.launch import ServerProcess, serve

__all__ = ["digest", "run_photos", "serve_held"]


class _Held:
    """A backend behind a lock."""

    def __init__(self, backend: Backend, lock: Path) -> None:
        self._backend = backend
        self._lock = lock

    def describe(self) -> BackendInfo:
        # One holds the lock, so that all others are in the queue.
        return replace(self._backend.describe(), slots=1)

    def warm_up(self) -> None:
        self._backend.warm_up()

    def infer(self, batch: Images) -> NDArray[np.float32]:
        with _locked(self._lock):
            with _order(self._lock.parent).open("a", encoding="ascii") as order:
                order.writelines(f"{digest(image)}\n" for image in batch)
            return self._backend.infer(batch)

    def close(self) -> None:
        self._backend.close()


def digest(pixels: NDArray[np.uint8]) -> str:
    """Of what the network is given of a photo."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def run_photos(folder: Path) -> list[str]:
    """The digests of all photos that the network was given, in their order."""
    return _order(folder).read_text(encoding="ascii").split()


def _order(folder: Path) -> Path:
    return folder / "order"


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def serve_held(
    folder: Path, *flags: str
) -> Iterator[tuple[ServerProcess, Callable[[], contextlib.AbstractContextManager[None]]]]:
    """A server, and what holds its network, but for a batch that runs already.

    Args:
        folder: for the lock, and the list of the photos that were run.
        flags: of the server.
    """
    lock = folder / "lock"
    lock.touch()
    with serve(*flags, command=["-m", "tests.support.held", str(lock)]) as server:
        yield server, lambda: _locked(lock)


if __name__ == "__main__":
    lock_file = Path(sys.argv.pop(1))

    def _open(*arguments: Any, **options: Any) -> Backend:
        return _Held(open_backend(*arguments, **options), lock_file)

    # A test may hold it for as long as it takes on a slow machine.
    with patch.object(loading, "open_backend", _open), patch.object(batching, "HUNG_S", 3600):
        sys.exit(main())
