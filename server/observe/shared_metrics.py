"""Where `--workers` keep their metrics: a folder in memory, with files for each worker's place.

A place's counters go on in the same file whoever fills it, so a worker that crashes again and again
leaves no more files than one that does not. All of them are as large as they get from the start:
what is written through a mapping has no other way to learn that the memory is full than SIGBUS.

The folder is locked for as long as the supervisor or a worker lives. What is left where all of them
were killed is removed by whoever starts next.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

__all__ = ["PLACE", "SHARED_FOLDER", "Folder"]

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that the library reads when it is imported: where processes share."""

PLACE = "SLSNET_METRICS_PLACE"
"""Environment variable: whose files are a process's own there."""

_PREFIX = "slsnet-metrics-"
_LOCK = "lock"

# One for each kind of metric that there is.
_FILES = (
    "counter",
    "histogram",
    "gauge_liveall",
    "gauge_livemax",
    "gauge_livemin",
    "gauge_livesum",
)
# Several times what they come to hold.
_FILE_BYTES = 2**17


class Folder:
    """A new one, locked by this process and by those that inherit `lock`.

    Raises:
        OSError: there is no room, or it may not be made.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Under its name once it is locked: until then the folder is nobody's to remove.
        unlocked = self.path / "unlocked"
        self.lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        """File descriptor."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)

    def reserve(self, place: int) -> None:
        """Make room for the metrics of whoever fills `place`; what was counted there stays.

        Raises:
            OSError: there is none.
        """
        for name in _FILES:
            path = self.path / f"{name}_{place}.db"
            if path.exists():
                continue
            # Whoever is asked for the metrics reads all that have that name: it is whole by then.
            begun = path.with_suffix(".begun")
            try:
                with begun.open("w+b") as file:
                    os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
                begun.rename(path)
            except OSError:
                begun.unlink(missing_ok=True)
                raise

    def vacate(self, place: int) -> None:
        """Take away what is of a worker only while it lives."""
        mark_process_dead(place, self.path)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take it away with all there is in it."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another user's cannot be opened, or not be removed; and others look at the same time.
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
