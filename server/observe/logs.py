"""The form of the log: a line of text for people, or of JSON for machines."""

import atexit
import contextlib
import ctypes
import io
import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from server.observe.log_writer import LogWriter

__all__ = ["configure", "finish", "silence_libtiff"]

_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class _Json(logging.Formatter):
    """One object a line; `extra={"fields": …}` adds members to it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        if fields is None:
            line["message"] = record.getMessage()
        else:
            line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def silence_libtiff() -> None:
    """Keep libtiff's messages on damaged photos out of stderr, where the log is.

    The client is told what is wrong with its photo. Call it once Pillow is loaded; it does nothing
    if libtiff is not a library of its own.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    for path in {line.split(maxsplit=5)[-1] for line in maps if "/libtiff" in line}:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


def configure(level: str, form: Literal["text", "json"], *, waits: bool = False) -> None:
    """Log to stderr from `level` on.

    A server never waits for the reader of its log; a command `waits`. Other packages log only
    warnings: at debug level Pillow writes a photo's EXIF.
    """
    formatter = _Json() if form == "json" else logging.Formatter(_TEXT)
    if waits:
        # Unbuffered: lines that a full disk refuses must not be tried once more at the end, where
        # they would change the exit code.
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False),
            encoding="utf-8",
            errors="backslashreplace",
            write_through=True,
        )
    else:
        _let_nobody_wait(formatter)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(logging.WARNING, least), handlers=[handler])
    for name in ("slsnet", "uvicorn"):
        logging.getLogger(name).setLevel(least)


def _let_nobody_wait(formatter: logging.Formatter) -> None:
    def describe_loss(lines: int) -> str:
        text = "%d lines of the log were lost, nobody took them in time"
        arguments = ("slsnet.logs", logging.WARNING, __file__, 0, text, (lines,), None)
        return formatter.format(logging.LogRecord(*arguments)) + "\n"

    atexit.register(finish)
    # Tracebacks go this way too: a log reader must not be able to stop a thread.
    sys.stderr = LogWriter(2, describe_loss)


def finish() -> None:
    """Write what is still queued, as far as the reader takes it, before an abrupt end."""
    if isinstance(sys.stderr, LogWriter):
        sys.stderr.finish()
