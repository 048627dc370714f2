"""What a run over a folder of photos left."""

import contextlib
import csv
import os
import sqlite3
from pathlib import Path

Table = dict[str, dict[str, str]]


def table(results: Path) -> Table:
    """Lines by path; every path once."""
    with (results / "table.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as f:
        lines = list(csv.DictReader(f))
    by_path = {line["path"]: line for line in lines}
    assert len(by_path) == len(lines)
    return by_path


def masks(results: Path) -> dict[str, int]:
    """Files below `masks/`, and when each was written."""
    folder = results / "masks"
    return {
        str(path.relative_to(results)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def recorded(results: Path) -> set[str]:
    """Paths that are done, as a killed process left them."""
    with contextlib.closing(sqlite3.connect(results / "state.sqlite")) as state:
        rows = state.execute("SELECT path FROM photos WHERE status IS NOT NULL").fetchall()
    return {os.fsdecode(path) for (path,) in rows}
