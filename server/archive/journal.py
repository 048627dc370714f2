"""Photos that were taken and results that are not delivered yet, in a database that survives a kill
at any moment.

An object is in the database, and the database on the disk, before it is acknowledged. Each has one
task for each step that is left: to be segmented, then to be delivered to each destination. A step
and what came of it are one transaction, so the results of a photo are made once, and sent again as
they are. Once the last task is done the object is erased. What stays is a receipt: a hash, by which
the same object is known if it comes again.
"""

import contextlib
import enum
import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = [
    "Accepted",
    "DeadLetter",
    "Journal",
    "JournalError",
    "JournalFull",
    "Result",
    "State",
    "Task",
]

_FILE = "journal.sqlite"
_LOCK = "lock"
_VERSION = 1

SEGMENT = "segment"
"""The first stage of every object."""

# ManufacturerModelName (0008,1090) of results, which another journal may have made. Nothing is
# parsed here, and in a deflated object nothing is found.
_RESULT = re.compile(rb"\x08\x00\x90\x10.{4}SLSNet Server ", re.DOTALL)
_HEAD_BYTES = 1 << 16

# Seconds that a command waits while the service writes.
_BUSY_S = 30

# Large contents are in a table of their own: SQLite writes a row anew whenever it changes.
_SCHEMA = """
CREATE TABLE objects (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uid BLOB NOT NULL, digest BLOB NOT NULL UNIQUE, received REAL NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE contents (
    object INTEGER NOT NULL REFERENCES objects ON DELETE CASCADE, content BLOB NOT NULL
);
CREATE INDEX contents_of ON contents (object);
CREATE TABLE tasks (
    object INTEGER NOT NULL REFERENCES objects ON DELETE CASCADE,
    stage TEXT NOT NULL, dead INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0, since REAL NOT NULL, due REAL NOT NULL,
    reason TEXT NOT NULL DEFAULT '', detail TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (object, stage)
) WITHOUT ROWID;
CREATE INDEX due ON tasks (dead, stage, due);
CREATE TABLE receipts (uid BLOB PRIMARY KEY, digest BLOB, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX receipts_at ON receipts (at);
"""


class JournalError(Exception):
    """The journal cannot be used; the message says what to change."""


class JournalFull(Exception):
    """There is no room for another object."""


class Accepted(enum.Enum):
    """What became of an object that came."""

    NEW = "accepted"
    DUPLICATE = "duplicate"
    """The same bytes are here, or were delivered."""
    OWN = "own"
    """It is a result of this program, sent back."""


@dataclass(frozen=True)
class Result:
    """An object that was made of a photo."""

    uid: str
    """Its SOP Instance UID."""
    content: bytes
    """A DICOM file."""


@dataclass(frozen=True)
class Task:
    """A step that is due."""

    object: int
    """Number of the object."""
    stage: str
    attempts: int
    """Failed ones."""
    since: float
    """Unix time of the first attempt."""


@dataclass(frozen=True)
class DeadLetter:
    """A step that nobody tries any more."""

    object: int
    stage: str
    reason: str
    detail: str
    attempts: int
    received: float
    """Unix time."""
    bytes: int


@dataclass(frozen=True)
class State:
    """What is in a journal."""

    waiting: dict[str, int]
    """Tasks by stage."""
    dead: dict[tuple[str, str], int]
    """Dead letters by stage and reason."""
    bytes: int
    oldest_s: float
    """Age of the oldest object that waits; 0 without one."""


class Journal:
    """The journal in one folder.

    Args:
        folder: made if it is missing; only this user may read what is in it.
        max_bytes: of all contents; more are refused.
        min_free_bytes: of the disk, which stay free.
        keep_s: seconds for which receipts are kept.
        alone: whether no other process may open it so. Commands that look at it need not.

    Raises:
        JournalError: the folder cannot be used, or another process has it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = 10 << 30,
        min_free_bytes: int = 0,
        keep_s: float = 30 * 86400,
        alone: bool = True,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._keep_s = keep_s
        self._mutex = threading.Lock()
        self._claimed: set[tuple[int, str]] = set()
        self._lock = -1
        path = folder / _FILE
        try:
            if alone:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = _locked(folder / _LOCK)
            elif not path.exists():
                raise JournalError(f"{folder} holds no journal.")
            # SQLite gives its other files the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
            self._database = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
        except BlockingIOError:
            raise JournalError(
                f"Another process is at work on {folder}: let it end, or name another folder."
            ) from None
        except OSError as error:
            raise JournalError(f"{error.filename}: {error.strerror}") from error
        try:
            self._open()
        except (sqlite3.Error, JournalError) as error:
            self.close()
            if isinstance(error, JournalError):
                raise
            raise JournalError(f"{path} cannot be used: {error}.") from error

    def _open(self) -> None:
        execute = self._database.execute
        # No write-ahead log: it would keep what is erased. Zeros are written over it in the
        # database. FULL: an acknowledged object survives a power cut, too.
        for setting in (
            "journal_mode = DELETE",
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
        ):
            execute(f"PRAGMA {setting}")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._database.executescript(
                f"BEGIN EXCLUSIVE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
            )
        elif version != _VERSION:
            raise JournalError(f"{self._folder} was written by another version of this program.")

    def close(self) -> None:
        """Close it, so that others can open it."""
        self._database.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._mutex:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database.execute
                self._database.execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    raise JournalFull("The disk is full.") from error
                raise

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._mutex:
            return self._database.execute(query, values).fetchall()

    def accept(self, uid: str, content: bytes) -> tuple[Accepted, int]:
        """Take an object; once this returns it is on the disk.

        Args:
            uid: its SOP Instance UID.
            content: the DICOM file.

        Returns:
            What became of it, and its number in the journal; 0 if it is not there.

        Raises:
            JournalFull: there is no room for it.
            sqlite3.Error: the disk fails.
        """
        if _RESULT.search(content, 0, _HEAD_BYTES):
            return Accepted.OWN, 0
        hashed, digest, now = _hash(uid.encode()), _hash(content), time.time()
        with self._change() as execute:
            for (known,) in execute("SELECT digest FROM receipts WHERE uid = ?", (hashed,)):
                if known is None:
                    return Accepted.OWN, 0
                if known == digest:
                    return Accepted.DUPLICATE, 0
            for (number,) in execute("SELECT id FROM objects WHERE digest = ?", (digest,)):
                return Accepted.DUPLICATE, number
            self._check_room(len(content))
            number = execute(
                "INSERT INTO objects (uid, digest, received, bytes) VALUES (?, ?, ?, ?)",
                (hashed, digest, now, len(content)),
            ).lastrowid
            execute("INSERT INTO contents VALUES (?, ?)", (number, content))
            self._add_tasks(execute, number, [SEGMENT], now)
        assert number is not None
        return Accepted.NEW, number

    def _check_room(self, size: int) -> None:
        (used,) = self._database.execute("SELECT coalesce(sum(bytes), 0) FROM objects").fetchone()
        if used + size > self._max_bytes:
            raise JournalFull(f"The journal holds {used} bytes of at most {self._max_bytes}.")
        free = shutil.disk_usage(self._folder).free
        if free - size < self._min_free_bytes:
            raise JournalFull(f"The disk has {free} bytes left.")

    @property
    def has_room(self) -> bool:
        """Whether a small object would be accepted."""
        with self._mutex:
            try:
                self._check_room(1)
            except JournalFull:
                return False
        return True

    @staticmethod
    def _add_tasks(
        execute: Callable[..., sqlite3.Cursor],
        number: int | None,
        stages: Collection[str],
        now: float,
    ) -> None:
        for stage in stages:
            execute(
                "INSERT INTO tasks (object, stage, since, due) VALUES (?, ?, ?, ?)",
                (number, stage, now, now),
            )

    def knows(self, uid: str) -> bool:
        """Whether an object of this SOP Instance UID is here, was delivered, or is a result."""
        hashed = _hash(uid.encode())
        return bool(
            self._all(
                "SELECT 1 FROM receipts WHERE uid = ?1 UNION SELECT 1 FROM objects WHERE uid = ?1",
                hashed,
            )
        )

    def claim(self, stage: str) -> Task | None:
        """The task of this stage that is due for longest; `release` it, whatever comes of it."""
        with self._mutex:
            for row in self._database.execute(
                "SELECT object, stage, attempts, since FROM tasks"
                " WHERE dead = 0 AND stage = ? AND due <= ? ORDER BY due LIMIT ?",
                (stage, time.time(), len(self._claimed) + 1),
            ):
                task = Task(*row)
                if (task.object, stage) not in self._claimed:
                    self._claimed.add((task.object, stage))
                    return task
        return None

    def release(self, task: Task) -> None:
        """Let others claim the task, if it is still there."""
        with self._mutex:
            self._claimed.discard((task.object, task.stage))

    def contents(self, task: Task) -> list[bytes]:
        """The photo if it is not segmented yet, else the results, in their order."""
        rows = self._all(
            "SELECT content FROM contents WHERE object = ? ORDER BY rowid", task.object
        )
        return [content for (content,) in rows]

    def segmented(self, task: Task, results: Sequence[Result], stages: Collection[str]) -> None:
        """The results take the photo's place; each of `stages` has them to deliver."""
        now, number = time.time(), task.object
        with self._change() as execute:
            execute("DELETE FROM contents WHERE object = ?", (number,))
            for result in results:
                execute("INSERT INTO contents VALUES (?, ?)", (number, result.content))
                execute(
                    "INSERT OR REPLACE INTO receipts VALUES (?, NULL, ?)",
                    (_hash(result.uid.encode()), now),
                )
            size = sum(len(result.content) for result in results)
            execute("UPDATE objects SET bytes = ? WHERE id = ?", (size, number))
            execute("DELETE FROM tasks WHERE object = ? AND stage = ?", (number, task.stage))
            self._add_tasks(execute, number, stages, now)

    def delivered(self, task: Task) -> bool:
        """The task is done. With its last task the object is erased; return whether that is so."""
        now = time.time()
        with self._change() as execute:
            execute("DELETE FROM tasks WHERE object = ? AND stage = ?", (task.object, task.stage))
            if execute("SELECT 1 FROM tasks WHERE object = ?", (task.object,)).fetchone():
                return False
            execute(
                "INSERT OR REPLACE INTO receipts SELECT uid, digest, ? FROM objects WHERE id = ?",
                (now, task.object),
            )
            execute("DELETE FROM objects WHERE id = ?", (task.object,))
            execute("DELETE FROM receipts WHERE at < ?", (now - self._keep_s,))
        return True

    def failed(self, task: Task, reason: str, detail: str, pause_s: float | None) -> None:
        """The attempt failed: try again after so many seconds, or never (None)."""
        with self._change() as execute:
            execute(
                "UPDATE tasks SET attempts = attempts + 1, due = ?, dead = ?, reason = ?,"
                " detail = ? WHERE object = ? AND stage = ?",
                (
                    time.time() + (pause_s or 0),
                    pause_s is None,
                    *(reason, detail),
                    *(task.object, task.stage),
                ),
            )

    def bury_others(self, stages: Collection[str]) -> int:
        """Tasks of other stages are dead, for their destination is not known any more."""
        marks = ", ".join("?" * len(stages))
        with self._change() as execute:
            return execute(
                "UPDATE tasks SET dead = 1, reason = 'no_destination',"
                " detail = 'The service was started without this destination.'"
                f" WHERE dead = 0 AND stage NOT IN ({marks})",
                tuple(stages),
            ).rowcount

    def state(self) -> State:
        """Counts of what is in it."""
        now = time.time()
        tasks = self._all("SELECT stage, dead, reason, count(*) FROM tasks GROUP BY 1, 2, 3")
        waiting: dict[str, int] = {}
        for stage, is_dead, _, count in tasks:
            if not is_dead:
                waiting[stage] = waiting.get(stage, 0) + count
        ((used, oldest),) = self._all(
            "SELECT (SELECT coalesce(sum(bytes), 0) FROM objects), (SELECT min(received) FROM"
            " objects WHERE EXISTS (SELECT 1 FROM tasks WHERE object = id AND dead = 0))"
        )
        dead = {(stage, reason): count for stage, is_dead, reason, count in tasks if is_dead}
        return State(waiting, dead, used, max(0.0, now - oldest) if oldest else 0.0)

    def dead_letters(self) -> list[DeadLetter]:
        """All of them, the oldest first."""
        return [
            DeadLetter(*row)
            for row in self._all(
                "SELECT id, stage, reason, detail, attempts, received, bytes FROM tasks"
                " JOIN objects ON object = id WHERE dead = 1 ORDER BY id, stage"
            )
        ]

    def retry(self, numbers: Collection[int] | None = None) -> int:
        """Try dead letters again: those of these objects, or all; return how many."""
        now = time.time()
        where, values = _of(numbers)
        with self._change() as execute:
            return execute(
                "UPDATE tasks SET dead = 0, attempts = 0, since = ?, due = ?"
                f" WHERE dead = 1{where}",
                (now, now, *values),
            ).rowcount

    def discard(self, numbers: Collection[int]) -> int:
        """Erase objects that have a dead letter, with all that is left of them; return how many."""
        where, values = _of(numbers)
        with self._change() as execute:
            return execute(
                f"DELETE FROM objects WHERE id IN (SELECT object FROM tasks WHERE dead = 1{where})",
                values,
            ).rowcount


def _of(numbers: Collection[int] | None) -> tuple[str, tuple[int, ...]]:
    if numbers is None:
        return "", ()
    return f" AND object IN ({', '.join('?' * len(numbers))})", tuple(numbers)


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _locked(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock
