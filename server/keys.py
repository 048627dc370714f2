"""API keys: a file with one line a key, which holds the key's hash and never the key.

    python -m server.keys new NAME           prints a new key, once, and the line to add to the file
    python -m server.keys new NAME --admin   one that may also use /admin

    # name   scope   SHA-256 of the key
    clinic   use     9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    ops      admin   60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752

A key is 256 random bits, so a fast hash is right: nobody can guess a key, and a slow hash, made for
passwords, would only let strangers keep the server busy.
"""

import argparse
import hashlib
import hmac
import logging
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.program import Help, program

__all__ = ["Key", "KeyFile", "KeyFileError", "new_key"]

log = logging.getLogger("slsnet.keys")

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<scope>use|admin)\s+(?P<hash>[0-9a-f]{64})"
)


class KeyFileError(ValueError):
    """The file of keys cannot be read, has no key, or has a malformed line."""


@dataclass(frozen=True)
class Key:
    """A key's owner, and what the key opens."""

    name: str
    scope: Literal["use", "admin"]
    digest: bytes
    """SHA-256 of the key."""


class KeyFile:
    """The keys of a file, which is read again when it changes.

    Raises:
        KeyFileError: the file cannot be read, or has no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # The state of the file when it could not be read; no file has this one.
        self._unread: tuple[int, int, int] | None = (-1, -1, -1)
        self._state = self._stat()
        self._keys = _read(path)

    @property
    def has_admin(self) -> bool:
        """Whether any key may use `/admin`."""
        self._refresh()
        return any(key.scope == "admin" for key in self._keys)

    def find(self, presented: str) -> Key | None:
        """The known key that this is, or None; it takes the same time for any key."""
        self._refresh()
        digest = hashlib.sha256(presented.encode()).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _refresh(self) -> None:
        state = self._stat()
        if state == self._state:
            return
        try:
            self._keys = _read(self._path)
        except KeyFileError as error:
            # The file is half written, or cannot be read for a moment. The old keys hold until it
            # can be read. It is tried again each time, since it may look the same then.
            if state != self._unread:
                self._unread = state
                log.error("the keys stay as they were: %s", error)
        else:
            self._state = state
            log.info("%d keys read from %s", len(self._keys), self._path)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def new_key(name: str, scope: Literal["use", "admin"] = "use") -> tuple[str, str]:
    """A new key and its line for the file.

    Raises:
        ValueError: `name` is not 1 to 64 letters, digits, dots, dashes and underscores.
    """
    key = f"slsnet_{secrets.token_urlsafe(32)}"
    line = f"{name} {scope} {hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise ValueError("A name has 1 to 64 letters, digits, dots, dashes and underscores.")
    return key, line


def _read(path: Path) -> list[Key]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            # The line itself stays out: somebody may have put a key there.
            raise KeyFileError(f"{path}, line {number}: not `NAME use|admin SHA256`.")
        scope: Literal["use", "admin"] = "admin" if match["scope"] == "admin" else "use"
        keys.append(Key(match["name"], scope, bytes.fromhex(match["hash"])))
    if not keys:
        # It was probably cut off while it was written, not meant to keep everybody out.
        raise KeyFileError(f"{path} has no key in it.")
    return keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog=program("server.keys"), description=__doc__, formatter_class=Help
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "new",
        help="print a new key, and its line for the file",
        description="Print a new key, once, and the line to add to the file of --api-keys-file.",
        formatter_class=Help,
    )
    command.add_argument(
        "name",
        metavar="NAME",
        help="whose key it is, which shows in the log: 1 to 64 letters, digits, dots, dashes and"
        " underscores",
    )
    command.add_argument(
        "--admin", action="store_true", help="the key may also use /admin, such as to reload"
    )
    given = parser.parse_args(arguments)
    try:
        key, line = new_key(given.name, "admin" if given.admin else "use")
    except ValueError as error:
        parser.error(str(error))
    print(f"Key, shown this once:     {key}")
    print(f"Line for the file of keys: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
