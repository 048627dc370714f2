"""The photos that are done, in a database beside the masks that survives a kill at any moment.

One transaction marks a photo as done, after its mask is on the disk. After a kill in between, the
photo is run again and its mask replaced by the same one. A mask is removed before its row, so no
kill leaves a mask without a row. The table is written from the database, whole.
"""

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from common.files import replacing
from common.tables import csv_line
from photos.forms import Form, forms
from server.bulk.sources import BulkError, Listed

__all__ = ["Counts", "Ledger", "Listing", "Row", "Task", "also_path"]

MASKS = "masks"
ALSO = "also"
TABLE = "table.csv"
COCO = "coco.json"
STATE = "state.sqlite"

_VERSION = 2

# What settings were in versions that did not know them: masks alone, of the only frame.
_FORMERLY: dict[str, Any] = {"also": "", "frame": 0}

# Photos listed in one transaction: one for each is slow, and a single one for all would need their
# whole size again in the journal.
_AT_ONCE = 10_000
_PAGE = 1000

# The names that `common.files.replacing` gives.
_LEFTOVER = re.compile(r"\..+(\.\w+)\.[a-z0-9_]{8}\1")
_LEFTOVER_TABLE = re.compile(
    rf"\.({re.escape(TABLE)}|{re.escape(COCO)})\.[a-z0-9_]{{8}}\.(csv|json)"
)


@dataclass(frozen=True)
class Task:
    """A photo to be run."""

    path: str
    """Its path in the listing."""
    mask: str
    """The path of its mask, below the folder of masks."""


@dataclass(frozen=True)
class Row:
    """The result for one photo; numbers are None if there is no mask, or no lesion in it."""

    status: Literal["ok", "unusable", "failed"]
    """An `unusable` photo is at fault itself, and stays so until its file changes. A `failed` one
    is tried again the next time: the photo could not be read, its mask not be written, or the
    network failed."""
    error: str = ""
    width: int | None = None
    """Width of photo and mask, pixels."""
    height: int | None = None
    area: int | None = None
    """Pixels above the threshold."""
    area_fraction: float | None = None
    box_x: int | None = None
    box_y: int | None = None
    box_width: int | None = None
    box_height: int | None = None
    centroid_x: float | None = None
    centroid_y: float | None = None
    mean_probability: float | None = None
    """Mean over the pixels above the threshold, at the network's 128×128."""
    max_probability: float | None = None
    quality: float | None = None
    """The Jaccard that is to be expected of the mask, if that is known."""
    fitness_distance: float | None = None
    """Of the photo from dermoscopic ones, if that is known; above 1 it is likely none."""
    backend: str | None = None
    precision: str | None = None
    milliseconds: float | None = None
    """Time of work on this photo; the photos of a batch share its time."""


@dataclass(frozen=True)
class Listing:
    """Numbers of photos that the source had."""

    named: int
    """Photos; a photo named twice counts twice."""
    repeated: int
    """Photos among them that were named before."""
    dropped: int
    """Photos that an earlier run listed and this one does not."""


@dataclass(frozen=True)
class Counts:
    """Numbers of photos."""

    listed: int
    done: int
    """Photos among them that were run already, with or without success."""
    unsuccessful: int
    """Photos among the done ones that have no mask."""


_ROW = [field.name for field in fields(Row)]

_SCHEMA_1 = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE photos (
    path BLOB PRIMARY KEY, mask BLOB NOT NULL UNIQUE, size INTEGER, modified_ns INTEGER,
    {", ".join(_ROW)}
) WITHOUT ROWID;
CREATE INDEX pending ON photos (path) WHERE status IS NULL;
CREATE INDEX unsuccessful ON photos (status) WHERE status IN ('unusable', 'failed');
"""

# `seen` is the number of the last listing that had the photo. `waiting` holds photos whose mask
# belongs to another photo that this listing has not had yet.
_TO_2 = """
ALTER TABLE photos ADD COLUMN seen INTEGER NOT NULL DEFAULT 0;
CREATE TABLE waiting (
    path BLOB PRIMARY KEY, size INTEGER, modified_ns INTEGER
) WITHOUT ROWID;
"""


class Ledger:
    """The state of one `RESULTS`, which no other process can open meanwhile."""

    def __init__(self, folder: Path) -> None:
        """Open the folder and lock it.

        Args:
            folder: `RESULTS`; made if it is missing.

        Raises:
            BulkError: it holds other things, or another process works on it.
        """
        self.folder = folder
        self.masks = folder / MASKS
        self.table = folder / TABLE
        state = folder / STATE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not state.exists() and any(folder.iterdir()):
                raise BulkError(
                    f"{folder} holds files, but no {STATE} of an earlier run. Choose a folder that"
                    " is empty or not there yet: nothing of yours shall be overwritten."
                )
        except OSError as error:
            raise BulkError(f"{error.filename}: {error.strerror}") from error
        self._listing = 0
        self._begun = False
        self._database = sqlite3.connect(state, timeout=1, isolation_level=None)
        try:
            self._open()
            # Made after the database: a folder with masks alone would be taken for another
            # program's.
            self.masks.mkdir(exist_ok=True)
        except OSError as error:
            self._database.close()
            raise BulkError(f"{error.filename}: {error.strerror}") from error
        except sqlite3.Error as error:
            self._database.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise BulkError(f"Another process is at work on {folder}: let it end.") from error
            raise BulkError(f"{state} cannot be used: {error}.") from error
        except BulkError:
            self._database.close()
            raise

    def _open(self) -> None:
        # One process at a time, also on file systems without shared memory. It survives a kill; a
        # power cut may lose the last rows, whose photos are then run again.
        for setting in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
            self._database.execute(f"PRAGMA {setting}")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version < _VERSION:
            script = _TO_2 if version == 1 else _SCHEMA_1 + _TO_2
            self._database.executescript(
                f"BEGIN EXCLUSIVE; {script} PRAGMA user_version = {_VERSION}; COMMIT;"
            )
        elif version != _VERSION:
            raise BulkError(
                f"{self.folder} was written by another version of this program. Choose a new"
                " folder, or finish with that version."
            )
        found = {row[1] for row in self._database.execute("PRAGMA table_info(photos)")}
        for name in _ROW:
            # Of the figures that a version before did not have, photos that are done have none.
            if name not in found:
                self._database.execute(f"ALTER TABLE photos ADD COLUMN {name}")
        # A write shows whether another process has it.
        self._database.execute("BEGIN EXCLUSIVE")
        self._database.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close it, so that others can open it."""
        if self._begun:
            self._set("running", 0)
        self._database.close()

    def begin(self, **wanted: Any) -> None:
        """Start or continue a run with these settings, such as `threshold=0.5`.

        Raises:
            BulkError: the earlier results were made with other settings.
        """
        for name, value in wanted.items():
            found = self._get(name)
            if found is None and self._get("source") is not None:
                found = _FORMERLY.get(name)
            if found is not None and found != value:
                raise BulkError(
                    f"{self.folder} has results for {name} {_told(found)}, and this run is for"
                    f" {_told(value)}."
                    " Choose another folder, or delete that one to start anew."
                )
        for name, value in wanted.items():
            self._set(name, value)
        if self._get("running"):
            self._remove_leftovers()
        self._set("running", 1)
        self._begun = True

    def _remove_leftovers(self) -> None:
        """Remove files that a killed process had begun to write."""
        for folder in (self.masks, self.folder / ALSO):
            for parent, _, names in os.walk(folder):
                for name in filter(_LEFTOVER.fullmatch, names):
                    Path(parent, name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _LEFTOVER_TABLE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def list(self, photos: Iterable[Listed]) -> Listing:
        """Take in the photos to do.

        A photo is run again if it failed, its file has changed, or its mask is gone. Photos of
        earlier runs that are not among `photos` keep their mask: they may have been moved away
        because they were done. Those without a mask are dropped, and those whose mask's name
        another photo needs. That happens once all of `photos` is known, so that a listing that is
        killed or fails drops none. An empty one, as of a disk that is not mounted, drops none.

        Raises:
            BulkError: two photos would have the same mask.
        """
        execute = self._database.execute
        self._listing = (self._get("listing") or 0) + 1
        self._set("listing", self._listing)
        execute("DELETE FROM waiting")
        named = repeated = dropped = 0
        execute("BEGIN")
        try:
            for photo in photos:
                named += 1
                repeated += not self._list(photo)
                if named % _AT_ONCE == 0:
                    execute("COMMIT")
                    execute("BEGIN")
            if named:
                dropped = self._drop("status IS NOT 'ok'")
                for path, *stamp in execute("SELECT path, size, modified_ns FROM waiting"):
                    photo = Listed(os.fsdecode(path), *stamp)
                    dropped += self._drop("mask = ?", os.fsencode(mask_path(photo.path)))
                    self._list(photo)
        finally:
            execute("COMMIT")
        return Listing(named, repeated, dropped)

    def _list(self, photo: Listed) -> bool:
        """List a photo; tell whether it is new in this run."""
        path = os.fsencode(photo.path)
        found = self._database.execute(
            "SELECT mask, status, size, modified_ns, seen FROM photos WHERE path = ?", (path,)
        ).fetchone()
        if found is None:
            # An entry that is no file has no mask, and blocks no photo.
            name = mask_path(photo.path) if photo.is_file else f"{photo.path}/.png"
            return self._list_new(photo, path, name)
        mask, status, *stamp, seen = found
        mask = os.fsdecode(mask)
        if seen == self._listing:
            return False
        self._database.execute("UPDATE photos SET seen = ? WHERE path = ?", (self._listing, path))
        has_mask = self._has_mask(mask)
        if photo.size is None and status == "ok" and has_mask:
            # The file is out of reach or gone: the mask is still that of the earlier photo.
            return True
        done = (status == "ok" and has_mask) or (status == "unusable" and not has_mask)
        if not done or stamp != [photo.size, photo.modified_ns]:
            if has_mask:
                self._remove(mask)
            nothing = ", ".join(f"{name} = NULL" for name in _ROW)
            self._database.execute(
                f"UPDATE photos SET {nothing}, size = ?, modified_ns = ? WHERE path = ?",
                (photo.size, photo.modified_ns, path),
            )
        return True

    def _list_new(self, photo: Listed, path: bytes, mask: str) -> bool:
        stamp = photo.size, photo.modified_ns
        other = self._database.execute(
            "SELECT path, seen FROM photos WHERE mask = ?", (os.fsencode(mask),)
        ).fetchone()
        if other is None:
            self._database.execute(
                "INSERT INTO photos (path, mask, size, modified_ns, seen) VALUES (?, ?, ?, ?, ?)",
                (path, os.fsencode(mask), *stamp, self._listing),
            )
            return True
        if other[1] == self._listing:
            raise BulkError(
                f"{os.fsdecode(other[0])} and {photo.path} would both have {MASKS}/{mask}. Rename"
                " one of them, or name them in lists of their own, with a folder of results"
                " for each."
            )
        # Once all are listed it is known whether the other one still exists.
        added = self._database.execute(
            "INSERT OR IGNORE INTO waiting VALUES (?, ?, ?)", (path, *stamp)
        )
        return added.rowcount == 1

    def _drop(self, which: str, *values: Any) -> int:
        """Forget photos that this listing has not had, and their masks; return how many."""
        execute = self._database.execute
        these = f"FROM photos WHERE seen != ? AND {which}"
        values = (self._listing, *values)
        for (mask,) in execute(f"SELECT mask {these}", values):
            if self._has_mask(name := os.fsdecode(mask)):
                self._remove(name)
        return execute(f"DELETE {these}", values).rowcount

    def _remove(self, mask: str) -> None:
        """Remove a mask, and the files beside it."""
        for form in forms(self._get("also") or ""):
            also_path(self.folder, form, mask).unlink(missing_ok=True)
        (self.masks / mask).unlink(missing_ok=True)

    def _has_mask(self, mask: str) -> bool:
        # pathlib would raise if no file can have that name.
        return os.path.isfile(self.masks / mask)  # noqa: PTH113

    def pending(self) -> Iterator[Task]:
        """The photos to be run, in the order of their paths; rows may be recorded meanwhile."""
        last = b""
        while page := self._database.execute(
            "SELECT path, mask FROM photos WHERE status IS NULL AND path > ? ORDER BY path LIMIT ?",
            (last, _PAGE),
        ).fetchall():
            for path, mask in page:
                yield Task(os.fsdecode(path), os.fsdecode(mask))
            last = page[-1][0]

    def record(self, done: Iterable[tuple[str, Row]]) -> None:
        """Mark photos as done, all or none of them; each is a path and its result."""
        self._database.execute("BEGIN")
        self._database.executemany(
            f"UPDATE photos SET {', '.join(f'{name} = ?' for name in _ROW)} WHERE path = ?",
            ((*astuple(row), os.fsencode(path)) for path, row in done),
        )
        self._database.execute("COMMIT")

    def counts(self) -> Counts:
        """The numbers of photos so far."""
        listed, pending, unsuccessful = (
            self._database.execute(f"SELECT count(*) FROM photos {condition}").fetchone()[0]
            for condition in (
                "",
                "WHERE status IS NULL",
                "WHERE status IN ('unusable', 'failed')",
            )
        )
        return Counts(listed, listed - pending, unsuccessful)

    def write_table(self) -> None:
        """Write every photo once, by path; `status` is pending if it has not been run."""
        rows = self._database.execute(
            f"SELECT path, mask, {', '.join(_ROW)} FROM photos ORDER BY path"
        )
        constant = ("weights_sha256", "threshold", "clean")
        columns = ["path", "mask", *_ROW, *constant]
        values = [self._get(name) for name in constant]
        with (
            replacing(self.table) as temporary,
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            file.write(csv_line([*columns]))
            for path, mask, status, *row in rows:
                found = f"{MASKS}/{os.fsdecode(mask)}" if status == "ok" else None
                cells = [os.fsdecode(path), found, status or "pending", *row, *values]
                file.write(csv_line(cells))

    def write_coco(self) -> None:
        """Write the photos that have a mask as one COCO data set, by path.

        An annotation is what `Form.COCO` wrote for its photo, with the quality as one more member.
        Photos without a lesion are images without an annotation.
        """
        rows = "SELECT path, mask, width, height, area, quality FROM photos WHERE status = 'ok'"
        with (
            replacing(self.folder / COCO) as temporary,
            temporary.open("w", encoding="ascii") as file,
        ):
            file.write('{"info": {"description": "SLSNet Server"}, "licenses": [], ')
            file.write('"categories": [{"id": 1, "name": "lesion"}], "images": [')
            found = enumerate(self._database.execute(f"{rows} ORDER BY path"), 1)
            for number, (path, _, width, height, *_) in found:
                image = {"id": number, "file_name": os.fsdecode(path)}
                image |= {"width": width, "height": height}
                file.write((",\n" if number > 1 else "\n") + json.dumps(image))
            file.write('], "annotations": [')
            separator = "\n"
            found = enumerate(self._database.execute(f"{rows} ORDER BY path"), 1)
            for number, (_, mask, *_, area, quality) in found:
                if not area:
                    continue
                path = also_path(self.folder, Form.COCO, os.fsdecode(mask))
                annotation = json.loads(path.read_bytes())
                annotation |= {"id": number, "image_id": number, "quality": quality}
                file.write(separator + json.dumps(annotation))
                separator = ",\n"
            file.write("]}\n")

    def _get(self, name: str) -> Any:
        row = self._database.execute(
            "SELECT value FROM settings WHERE name = ?", (name,)
        ).fetchone()
        return row and row[0]

    def _set(self, name: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))


def _told(value: Any) -> Any:
    return "none" if value == "" else value


def mask_path(path: str) -> str:
    """The path of a photo's mask, a PNG, below the folder of masks.

    A folder whose name could be a mask's gets an underscore: the mask of `a.png/b.jpg` is
    `a.png_/b.png`, since `a.png` is the mask of `a.jpg`.
    """
    # pathlib would keep every part of a path in memory for a while.
    *folders, name = path.lstrip("/").split("/")
    folders = [f"{each}_" if each.lower().endswith(".png") else each for each in folders]
    return "/".join([*folders, os.path.splitext(name)[0] + ".png"])  # noqa: PTH122


def also_path(results: Path, form: Form, mask: str) -> Path:
    """The path of another form of file, beside the mask with this path below its folder."""
    return results / ALSO / (mask.removesuffix(".png") + form.suffix)
