"""The moment after which an answer is of no use."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from server.inference.errors import DeadlineExceeded

__all__ = ["Deadline"]


class Deadline:
    """The deadline of a request, on the one clock that all its stages use."""

    def __init__(self, started: float, seconds: float) -> None:
        """Set the deadline; it may be shortened later.

        Args:
            started: second of `time.perf_counter`.
            seconds: how long the request may take.
        """
        self._started = started
        self._seconds = seconds

    @property
    def at(self) -> float:
        """Second of `time.perf_counter`."""
        return self._started + self._seconds

    @property
    def left_s(self) -> float:
        """Seconds from now until the deadline; negative once it has passed."""
        return self.at - time.perf_counter()

    def shorten(self, microseconds: int) -> None:
        """Allow at most so many seconds since the start."""
        # Compared before it becomes a float: JSON may hold integers that no float can.
        if microseconds < self._seconds * 1e6:
            self._seconds = microseconds / 1e6

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Cancel the block when the deadline passes.

        Raises:
            DeadlineExceeded: it passed.
        """
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(
                f"The deadline of {self._seconds * 1000:g} ms passed before the answer was ready."
            ) from None
