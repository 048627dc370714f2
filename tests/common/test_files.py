"""Files that are replaced: a reader sees the old bytes or all of the new ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.files import replacing, write_atomically
from tests.support import ROOT

KILLED = """
import os, signal, sys
from pathlib import Path
from common.files import replacing
with replacing(Path(sys.argv[1])) as temporary, temporary.open("wb") as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    writer = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False)

    assert writer.returncode == -9
    assert path.read_bytes() == b"old"


def test_an_error_in_the_middle_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_is_readable_by_others_and_keeps_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"

    with replacing(path) as temporary:
        assert temporary.suffix == ".csv", "some libraries write what the suffix says"
        temporary.write_bytes(b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_name_may_be_as_long_as_a_file_s_can_be(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".png", "ö" * 125 + "n.png"):
        path = tmp_path / name
        write_atomically(path, b"new")
        assert path.read_bytes() == b"new"
