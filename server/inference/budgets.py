"""Budgets that keep the bytes and pixels in memory under their limits."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["ByteBudget", "PixelBudget"]


class ByteBudget:
    """Keeps the bytes of all bodies in memory under a limit.

    A request gives its bytes back as soon as its deadline passes, though a thread that works on its
    body cannot be interrupted. So each thread may hold one body beyond the limit.
    """

    def __init__(self, limit: int, whole: "ByteBudget | None" = None) -> None:
        """Allow `limit` bytes, which also count in `whole`, the budget that this is a share of."""
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
        """Give a function that takes bytes from the budget until the end of the block.

        A negative number gives bytes back earlier.

        Args:
            full: makes the exception that is raised if the budget does not suffice.
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
    """Keeps the pixels of all photos being decoded under a limit: threads wait for room.

    They are served in order: otherwise a large photo would wait while smaller ones keep coming. A
    photo larger than the limit is let in when it is alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Wait for room for so many pixels, and hold it during the block."""
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
