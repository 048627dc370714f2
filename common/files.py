"""Atomic files: a kill at any moment leaves the old file or the new one, never half of one."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_unfinished", "replacing", "write_atomically"]

# A name may have 255 bytes. A suffix, eight characters and two dots are added to these.
_NAME_BYTES = 200


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once the block has ended and all is on the disk."""
    temporary = path.parent / f".{_end(path)}.{secrets.token_hex(4)}{path.suffix}"
    # Those may read it who may read any new file of this process (umask).
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of `path`, while no other process writes it."""
    name = re.compile(rf"\.{re.escape(_end(path))}\.[0-9a-f]{{8}}{re.escape(path.suffix)}")
    for found in path.parent.iterdir():
        if name.fullmatch(found.name):
            found.unlink(missing_ok=True)


def _end(path: Path) -> str:
    """Only the end of a long name: the whole of it would make a name too long for a file."""
    return os.fsencode(path.name)[-_NAME_BYTES:].decode(errors="ignore")


def write_atomically(path: Path, data: bytes) -> None:
    """`data` as the file `path`: a reader sees the old bytes or all of the new ones."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
