"""The photos of a run: those of a folder, or those that a list names; of any number."""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.tables import from_cell

__all__ = ["SUFFIXES", "BulkError", "Listed", "Source", "open_source"]

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".avif",
    ".heic",
    ".heif",
    ".dcm",
)
"""Suffixes of a folder's photos, in any case; files of a list may have any suffix."""

# How the ISIC challenges call what lies beside a photo and belongs to it, before the suffix.
_BELONGS = ("_segmentation", "_superpixels")

# The first columns of a table of results.
_OURS = ("path", "mask", "status", "error")

_TABLES = {".csv": ",", ".tsv": "\t"}

# Bytes of a file in which a photo has a zero byte, and no path has one.
_BEGINNING = 4096


class BulkError(Exception):
    """The run cannot begin, or cannot go on; the message says what to change."""


@dataclass(frozen=True)
class Listed:
    """A photo of the source."""

    path: str
    """Relative to the source's folder if it lies there, else absolute. Names that are not UTF-8
    have surrogates (PEP 383)."""
    size: int | None
    """Bytes; None if there is no such file."""
    modified_ns: int | None
    is_file: bool = True
    """False for a folder that cannot be read and a link that leads nowhere: they have a row too."""


class Source:
    """A folder or a list, read without holding all of it in memory."""

    def __init__(self, root: Path, manifest: Path | None, results: Path) -> None:
        """Remember where the photos are; nothing is read yet.

        Args:
            root: absolute path of the folder that relative paths start from.
            manifest: file that lists the photos; None for all photos in `root`.
            results: absolute path of the folder of results, in which no photo may lie.
        """
        self.root = root
        self.manifest = manifest
        self._results = results
        self.passed_over: Counter[str] = Counter()
        """The number of a folder's files that are not photos, by suffix, or by what ISIC's masks
        and superpixels have in place of one."""

    @property
    def identity(self) -> str:
        """The name by which the same source is known the next time."""
        return str(self.manifest or self.root)

    def photos(self) -> Iterator[Listed]:
        """Yield each photo; one that a list names twice comes twice.

        Raises:
            BulkError: the list or a folder cannot be read, or a photo lies among the results.
        """
        try:
            if self.manifest is None:
                yield from self._walk()
            else:
                yield from map(self._named, _entries(self.manifest))
        except OSError as error:
            raise BulkError(f"{error.filename or self.identity}: {error.strerror}") from error
        except csv.Error as error:
            raise BulkError(f"{self.manifest} is not a table: {error}") from error

    def _walk(self) -> Iterator[Listed]:
        self.passed_over.clear()
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    yield from self._sort(entries, folders)
            except OSError:
                if folder == self.root:
                    raise
                yield self._unreadable(folder, is_file=False)

    def _sort(self, entries: Iterable[os.DirEntry[str]], folders: list[Path]) -> Iterator[Listed]:
        """The photos among a folder's entries; add its folders to `folders`."""
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            suffix = path.suffix.lower()
            is_photo = suffix in SUFFIXES
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    continue
                if entry.is_dir():
                    # Links to folders are not followed, since they may form a circle.
                    continue
            except OSError:
                # For example a link to itself.
                yield self._unreadable(path, is_file=is_photo)
                continue
            if not is_photo:
                self.passed_over[suffix] += 1
            elif belongs := _belongs_to_a_photo(path):
                self.passed_over[belongs + suffix] += 1
            else:
                yield self._found(path)

    def _named(self, entry: str) -> Listed:
        path = Path(os.path.normpath(self.root / entry))
        if path.is_relative_to(self._results):
            raise BulkError(
                f"{path} lies in {self._results}, where the results go. Choose another folder for"
                " them."
            )
        return self._found(path)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def _unreadable(self, path: Path, *, is_file: bool) -> Listed:
        # Its row will say why.
        return Listed(self._name(path), None, None, is_file)

    def _found(self, path: Path) -> Listed:
        name = self._name(path)
        try:
            status = path.stat()
        except (OSError, ValueError):
            # Its row will say so.
            return Listed(name, None, None)
        return Listed(name, status.st_size, status.st_mtime_ns)


def _belongs_to_a_photo(path: Path) -> str:
    """How the name of a photo's mask or superpixels goes on after the photo's; empty for others."""
    if path.suffix.lower() != ".png":
        return ""
    for ending in _BELONGS:
        stem = path.stem.lower().removesuffix(ending)
        if stem != path.stem.lower():
            photo = path.stem[: len(stem)]
            forms = {form for end in SUFFIXES for form in (end, end.upper(), end.title())}
            if any(path.with_name(photo + form).is_file() for form in forms):
                return ending
    return ""


def open_source(path: Path, results: Path) -> Source:
    """`PHOTOS` and `RESULTS` of the command line.

    Raises:
        BulkError: the source is neither a folder nor a list, or one lies in the other.
        OSError: the list cannot be read.
    """
    into = results.resolve()
    if path.is_dir():
        root = path.resolve()
        if into.is_relative_to(root) or root.is_relative_to(into):
            raise BulkError(
                f"{path} and {results} lie one in the other: masks would be taken for photos the"
                " next time. Choose a folder for the results that is apart from the photos."
            )
        return Source(root, None, into)
    if path.is_file():
        with path.open("rb") as file:
            if b"\0" in file.read(_BEGINNING):
                raise BulkError(
                    f"{path} is no list of paths. If it is a photo, name its folder instead, or use"
                    " `slsnet segment` for this one."
                )
        root = path.parent.resolve()
        return Source(root, root / path.name, into)
    raise BulkError(f"{path} is neither a folder nor a list of photos: there is no such file.")


def _entries(manifest: Path) -> Iterator[str]:
    """The paths of a list: one a line, or a table's column `path`."""
    delimiter = _TABLES.get(manifest.suffix.lower())
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if delimiter is None:
            yield from filter(None, (line.rstrip("\r\n") for line in lines))
            return
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        columns = table.fieldnames or []
        if "path" not in columns:
            raise BulkError(
                f"{manifest} has no column called path; its first line has: {', '.join(columns)}."
                " Rename the column with the photos' paths."
            )
        # A table of results has its paths in the form for spreadsheets.
        is_ours = columns[: len(_OURS)] == [*_OURS]
        for row in table:
            if path := row["path"]:
                yield from_cell(path) if is_ours else path
