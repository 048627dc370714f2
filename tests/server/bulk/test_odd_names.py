"""Folders with names and entries that are not as one would wish: a row each, and on."""

import csv
import os
import stat
import sys
from pathlib import Path

import pytest

from common.tables import csv_line, from_cell, to_cell
from server.bulk.__main__ import main
from tests.support.lesions import drawn_photo

PHOTO = drawn_photo(3, 64, 48, "PNG")


def bulk(source: Path, results: Path) -> int:
    return main([str(source), str(results), "--threads", "1"])


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PHOTO)
    return path


def rows(results: Path) -> dict[str, dict[str, str]]:
    with (results / "table.csv").open(encoding="utf-8", newline="") as file:
        return {from_cell(row["path"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["loop.jpg", "loop", "good"])
def test_a_link_to_itself_has_a_row_and_the_rest_is_done(tmp_path: Path, name: str) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    put(folder / "a/good.png")
    (folder / "a" / name).symlink_to(name)

    assert bulk(folder, results) == 1
    found = rows(results)
    assert found["a/good.png"]["status"] == "ok"
    assert found[f"a/{name}"]["status"] == "failed"
    assert "symbolic links" in found[f"a/{name}"]["error"]

    (folder / "a" / name).unlink()
    assert bulk(folder, results) == 0
    assert rows(results).keys() == {"a/good.png"}


def test_a_folder_that_cannot_be_read_has_a_row_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    put(folder / "locked/hidden.png")
    put(folder / "locked.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        # Root may read whatever its mode says.
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        assert bulk(folder, results) == 1
    found = rows(results)
    assert (found["locked"]["status"], found["locked"]["mask"]) == ("failed", "")
    assert found["locked"]["error"] == "Permission denied"
    assert found["locked.png"]["status"] == "ok"

    assert bulk(folder, results) == 0
    assert rows(results).keys() == {"locked/hidden.png", "locked.png"}


NAMES = [
    "=1+1.png",
    "+a.png",
    "-a.png",
    "@a.png",
    "\ta.png",
    " =a.png",
    "'=a.png",
    "'a.png",
    "＝a.png",
    "a\rb.png",
    "a\r\nb.png",
    "a\nb.png",
    '"a,b".png',
    "plain.png",
]


def test_names_break_no_row_and_are_no_formulas(tmp_path: Path) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    for name in NAMES:
        put(folder / name)
    assert bulk(folder, results) == 0
    found = rows(results)
    assert found.keys() == set(NAMES)
    for row in found.values():
        assert row["status"] == "ok"
        assert row["path"].lstrip()[0] not in "=+-@＝"
        assert (results / from_cell(row["mask"])).is_file()
    written = (results / "table.csv").stat().st_mtime_ns
    masks = {path: path.stat().st_mtime_ns for path in results.glob("masks/*")}
    assert bulk(folder, results) == 0
    assert (results / "table.csv").stat().st_mtime_ns > written
    assert {path: path.stat().st_mtime_ns for path in results.glob("masks/*")} == masks


def test_a_table_of_results_is_a_list_of_the_same_photos(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in NAMES:
        put(folder / name)
    assert bulk(folder, tmp_path / "first") == 0
    again = folder / "again.csv"
    again.write_bytes((tmp_path / "first/table.csv").read_bytes())
    assert bulk(again, tmp_path / "second") == 0
    assert rows(tmp_path / "second").keys() == set(NAMES)


@pytest.mark.parametrize("text", [*NAMES, "", "''", "=", "\r", " "])
def test_every_text_comes_back_from_its_cell(text: str) -> None:
    assert from_cell(to_cell(text)) == text
    (read,) = csv.reader([csv_line([text, None, 1.5])])
    assert (from_cell(read[0]), read[1:]) == (text, ["", "1.5"])


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_who_may_read_results_is_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    put(folder / "a/b.png")
    before = os.umask(umask)
    try:
        assert bulk(folder, results) == 0
    finally:
        os.umask(before)
    for path in (results / "masks/a/b.png", results / "table.csv"):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    for path in (results, *results.rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & umask, path


def test_a_photo_beside_a_folder_called_as_its_mask(tmp_path: Path) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    for name in ("a.jpg", "a.png/b.jpg", "a.png/c.png/d.jpg"):
        put(folder / name)
    assert bulk(folder, results) == 0
    found = {path: row["mask"] for path, row in rows(results).items()}
    assert found == {
        "a.jpg": "masks/a.png",
        "a.png/b.jpg": "masks/a.png_/b.png",
        "a.png/c.png/d.jpg": "masks/a.png_/c.png_/d.png",
    }
    assert all((results / mask).is_file() for mask in found.values())
