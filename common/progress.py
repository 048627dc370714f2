"""Progress of a long command on stderr; of several processes only the first writes."""

import os
import sys
import time
from collections import deque
from typing import TextIO

__all__ = ["TELL_EVERY_S", "Progress", "say", "tell"]

TELL_EVERY_S = 10.0
"""After its first step a command tells its progress at most this often."""

# Seconds over which the pace is measured.
_WINDOW_S = 30

# Seconds between two lines on a terminal, where a line is overwritten.
_TERMINAL_S = 0.5


def say(what: str) -> None:
    """Write a line."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(what, file=sys.stderr, flush=True)


def tell(what: str, left_s: float) -> None:
    """Write a line of progress, with the time that is left."""
    minutes, seconds = divmod(int(left_s), 60)
    say(f"{what} left {minutes}:{seconds:02d}")


class Progress:
    """Lines such as `1200 of 2000 photos (60%), 3 without a mask, 24.1 photos/s, 0:33 left`.

    Args:
        done: number of photos that earlier runs finished.
        unsuccessful: number of photos among the done ones that have no mask.
        out: stream to write to; stderr by default.
        stage: begins each line.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        unsuccessful: int = 0,
        out: TextIO | None = None,
        *,
        stage: str = "",
    ) -> None:
        self._out = out or sys.stderr
        self._stage = stage
        self._total = total
        self._done = done
        self._unsuccessful = unsuccessful
        self._terminal = self._out.isatty()
        self._shown = time.monotonic()
        self._marks = deque([(self._shown, done)])

    def add(self, *, successful: bool = True) -> None:
        """Count one more photo as done."""
        self._done += 1
        self._unsuccessful += not successful
        now = time.monotonic()
        if now - self._shown >= (_TERMINAL_S if self._terminal else TELL_EVERY_S):
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
        text = f"{self._stage}{self._done} of {self._total} photos"
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
