"""Writes the log in a thread of its own, so that a log reader that stalls holds up no request.

It is hand-written because `logging.handlers.QueueHandler` bounds lines, not bytes, and its listener
waits at exit without limit for a reader that stalls.
"""

import collections
import contextlib
import io
import os
import select
import threading
import time
from collections.abc import Callable

__all__ = ["LogWriter", "lost_lines"]

# Bytes that may wait to be written. Lines beyond that are lost.
_MAX_BYTES = 2**18

# Seconds that the end of the process waits for the last lines.
_LAST_LINES_S = 1.0

_lost = 0


def lost_lines() -> int:
    """The number of lines that this process has lost so far."""
    return _lost


class LogWriter(io.TextIOBase):
    """A text stream that never blocks and never fails; lines without room are lost and counted."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int, describe_loss: Callable[[int], str]) -> None:
        """Write to `descriptor`; `describe_loss` makes the line that tells how many were lost."""
        self._descriptor = descriptor
        self._describe_loss = describe_loss
        self._waiting: collections.deque[bytes] = collections.deque()
        self._bytes = 0
        self._untold = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str, /) -> int:
        """Queue the text if there is room, and do not wait."""
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes + len(data) > _MAX_BYTES:
                self._lose(data)
            else:
                self._bytes += len(data)
                self._waiting.append(data)
                self._changed.notify_all()
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """The file descriptor that it writes to."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it writes to a terminal."""
        return os.isatty(self._descriptor)

    def finish(self, patience_s: float = _LAST_LINES_S) -> None:
        """Wait until all is written, but no longer than this."""
        give_up = time.monotonic() + patience_s
        with self._changed:
            while self._bytes and (left_s := give_up - time.monotonic()) > 0:
                self._changed.wait(left_s)

    def _lose(self, data: bytes) -> None:
        global _lost
        lines = max(1, data.count(b"\n"))
        _lost += lines
        self._untold += lines

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                data = self._waiting.popleft()
            written = self._write(data)
            with self._changed:
                self._bytes -= len(data)
                if not written:
                    self._lose(data)
                elif self._untold and not self._waiting:
                    line = self._describe_loss(self._untold).encode()
                    self._untold = 0
                    self._bytes += len(line)
                    self._waiting.append(line)
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Write, and tell whether all was taken. A full disk is not tried again."""
        with contextlib.suppress(OSError):
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:
                    select.select([], [self._descriptor], [])
        return not data
