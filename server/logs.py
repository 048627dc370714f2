"""What the log looks like: a line of text for people, or of JSON for machines."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = ["configure"]

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


def configure(level: str, form: Literal["text", "json"]) -> None:
    """Log to stderr from `level` on.

    Of other packages warnings alone: at debug level Pillow writes what a photo's EXIF says.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else logging.Formatter(_TEXT))
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(logging.WARNING, least), handlers=[handler])
    for name in ("slsnet", "uvicorn"):
        logging.getLogger(name).setLevel(least)
