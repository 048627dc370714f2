"""The progress of an archive: how far, how fast, how long; it names no photo."""

import sys
import time
from collections import deque
from typing import TextIO

__all__ = ["Progress"]

# Seconds over which the pace is measured.
_WINDOW_S = 30

# Seconds between two lines. On a terminal a line is overwritten, elsewhere it stays.
_TERMINAL_S = 0.5
_FILE_S = 10


class Progress:
    """Lines such as `1200 of 2000 photos (60%), 3 without a mask, 24.1 photos/s, 0:33 left`."""

    def __init__(self, total: int, done: int, unsuccessful: int, out: TextIO | None = None) -> None:
        """Begin to count; nothing is written yet.

        Args:
            total: number of all photos.
            done: number of photos that earlier runs finished.
            unsuccessful: number of photos among the done ones that have no mask.
            out: stream to write to; stderr by default.
        """
        self._out = out or sys.stderr
        self._total = total
        self._done = done
        self._unsuccessful = unsuccessful
        self._terminal = self._out.isatty()
        self._shown = time.monotonic()
        self._marks = deque([(self._shown, done)])

    def add(self, *, successful: bool) -> None:
        """Count one more photo as done."""
        self._done += 1
        self._unsuccessful += not successful
        now = time.monotonic()
        if now - self._shown >= (_TERMINAL_S if self._terminal else _FILE_S):
            self._marks.append((now, self._done))
            while now - self._marks[0][0] > _WINDOW_S and len(self._marks) > 2:
                self._marks.popleft()
            self._show(now)

    def end(self) -> None:
        """Write the last line."""
        self._show(time.monotonic())
        if self._terminal:
            print(file=self._out)

    def _show(self, now: float) -> None:
        self._shown = now
        since, before = self._marks[0]
        pace = (self._done - before) / (now - since) if now > since else 0
        left = self._total - self._done
        text = f"{self._done} of {self._total} photos"
        if self._total:
            text += f" ({100 * self._done // self._total}%)"
        if self._unsuccessful:
            text += f", {self._unsuccessful} without a mask"
        if pace:
            text += f", {pace:.3g} photos/s"
            if left:
                text += f", {_clock(left / pace)} left"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._out, flush=True)
        else:
            print(text, file=self._out, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
