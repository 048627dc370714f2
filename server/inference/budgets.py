"""Bytes and pixels that are held at this moment, kept under limits."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["ByteBudget", "PixelBudget"]


class ByteBudget:
    """Bytes of all the bodies that are held at this moment, kept under a limit.

    Those of a request whose deadline passes come back at once, though a thread that is at work on
    its body cannot be interrupted: beyond the limit there can be one body for each thread.
    """

    def __init__(self, limit: int, whole: "ByteBudget | None" = None) -> None:
        """Begin with nothing taken.

        Args:
            limit: most bytes.
            whole: the budget that this one is a share of.
        """
        self.limit = limit
        self.used = 0
        self._whole = whole

    def _take(self, amount: int) -> bool:
        if self.used + amount > self.limit:
            return False
        if self._whole is not None and not self._whole._take(amount):
            return False
        self.used += amount
        return True

    @contextlib.contextmanager
    def account(self, full: Callable[[], Exception]) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes bytes from the budget, which come back in the end.

        Or before: a negative number gives back.

        Args:
            full: makes the exception that is raised where the budget does not suffice.
        """
        taken = 0

        def take(amount: int) -> None:
            nonlocal taken
            if not self._take(amount):
                raise full()
            taken += amount

        try:
            yield take
        finally:
            self._take(-taken)


class PixelBudget:
    """Pixels of all the photos that are being decoded: threads wait until there is room for more.

    First come, first served: else a large photo would wait for as long as smaller ones keep coming.
    One larger than the limit is let in when it is alone, so that every photo's turn comes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Wait for room, and hold it."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(
                    lambda: (
                        self._waiting[0] is turn
                        and (not self.used or self.used + pixels <= self.limit)
                    )
                )
                self.used += pixels
            finally:
                self._waiting.remove(turn)
                # There may be room for the next one too.
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.used -= pixels
                self._changed.notify_all()
