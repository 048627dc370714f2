"""The folder in memory where `--workers` keep their metrics, with files for each worker's number.

`prometheus_client` writes and adds up the files. Three things it lacks are done here. Its files go
by process id; here a new worker continues the files of the one it replaces, so that crashes do not
fill the folder. The files have their full size from the start: a write to a mapping in full memory
ends a process with SIGBUS. And the folder is locked while the supervisor or a worker lives, so that
the next start can remove one that was left behind.

The lock's file has a byte for each worker, which tells those that start beside it whether it
accepts connections.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

__all__ = ["SHARED_FOLDER", "WORKER", "Folder", "mark_accepting", "others_accept"]

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that the library reads when it is imported: the shared folder."""

WORKER = "SLSNET_METRICS_WORKER"
"""Environment variable: the number of the worker, which names its files."""

_PREFIX = "slsnet-metrics-"
_LOCK = "lock"

# One file for each kind of metric.
_FILES = (
    "counter",
    "histogram",
    "gauge_liveall",
    "gauge_livemax",
    "gauge_livemin",
    "gauge_livesum",
)
# Several times as much as they come to hold.
_FILE_BYTES = 2**17


class Folder:
    """A new folder, locked by this process and by those that inherit `lock`.

    Raises:
        OSError: there is no room, or no permission.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # The lock gets its name once it is held: until then nobody removes the folder.
        unlocked = self.path / "unlocked"
        self.lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        """File descriptor of the lock, which the folder belongs to while it is held."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)

    def reserve(self, worker: int) -> None:
        """Make the files of this worker's number, unless an earlier worker left them.

        Raises:
            OSError: there is no room.
        """
        for name in _FILES:
            path = self.path / f"{name}_{worker}.db"
            if path.exists():
                continue
            # A process that renders the metrics reads every file with that name: it is whole then.
            begun = path.with_suffix(".begun")
            try:
                with begun.open("w+b") as file:
                    os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
                begun.rename(path)
            except OSError:
                begun.unlink(missing_ok=True)
                raise

    def vacate(self, worker: int) -> None:
        """Remove the metrics that a worker has only while it lives; it accepts no connections."""
        _mark(self.path, worker, accepts=False)
        mark_process_dead(worker, self.path)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Remove the folder with all its files."""
        shutil.rmtree(self.path, ignore_errors=True)


def mark_accepting(*, accepts: bool) -> None:
    """Let the other workers know whether this one accepts connections; for a worker alone."""
    _mark(Path(os.environ[SHARED_FOLDER]), int(os.environ[WORKER]), accepts=accepts)


def others_accept() -> bool:
    """Whether another worker than this one accepts connections."""
    folder, own = Path(os.environ[SHARED_FOLDER]), int(os.environ[WORKER])
    try:
        marks = (folder / _LOCK).read_bytes()
    except OSError:
        return False
    return any(accepts for worker, accepts in enumerate(marks) if worker != own)


def _mark(folder: Path, worker: int, *, accepts: bool) -> None:
    # Without it the others wait for no longer than if this one were not there.
    with contextlib.suppress(OSError), (folder / _LOCK).open("r+b") as file:
        os.pwrite(file.fileno(), bytes([accepts]), worker)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # Another user's folder cannot be opened or removed, and others sweep at the same time.
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
