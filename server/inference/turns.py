"""Photos take turns: they are decoded only shortly before the network can run them.

Decoding far ahead takes the processor from photos that are nearly done. A full queue would first be
decoded as a whole, while hardly an answer is sent.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

__all__ = ["Turns"]


class Turns:
    """Limits how many photos are between the start of their decoding and the network's result."""

    def __init__(self, limit: int) -> None:
        self._free = asyncio.Semaphore(limit)
        self._waiting: dict[object, float] = {}

    def waiting(self) -> int:
        """Photos that wait for their turn."""
        return len(self._waiting)

    def longest_wait_s(self) -> float:
        """The longest time that one of them has waited up to now."""
        since = next(iter(self._waiting.values()), None)
        return 0.0 if since is None else time.perf_counter() - since

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, first come first served, and hold it during the block."""
        photo = object()
        self._waiting[photo] = time.perf_counter()
        try:
            await self._free.acquire()
        finally:
            del self._waiting[photo]
        try:
            yield
        finally:
            self._free.release()
