"""Threads for what would hold up the event loop: decoding, encoding, loading."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

__all__ = ["Threads"]

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Threads:
    """Pools: for photos that somebody waits for, for slow ones, for bulk's, for one at a time."""

    def __init__(self, count: int) -> None:
        """Make the pools; no thread starts before it is needed.

        Args:
            count: threads of the first pool; bulk has half as many.
        """
        self.interactive = ThreadPoolExecutor(count, thread_name_prefix="work")
        # Of their own, so that no photo that somebody waits for queues up behind bulk's.
        self._bulk = ThreadPoolExecutor(max(1, count // 2), thread_name_prefix="bulk")
        # So that photos that take seconds never have all threads, and others go on beside them.
        self._slow = ThreadPoolExecutor(max(1, count - 1), thread_name_prefix="slow")
        self._lone = ThreadPoolExecutor(1, thread_name_prefix="lone")

    async def run(
        self,
        work: Callable[[*Arguments], Result],
        *arguments: *Arguments,
        bulk: bool = False,
        slow: bool = False,
        alone: bool = False,
    ) -> Result:
        """Run `work` in a pool, where it does not hold up the event loop.

        If this is cancelled, work that waits for a thread is let go, and its arguments with it;
        work that has begun goes on to its end.

        Args:
            work, arguments: what to call, and with what.
            bulk: others go first.
            slow: it may take seconds.
            alone: no two of those that are so at the same time, not even if one was cancelled.
        """
        # The pool's queue keeps what was cancelled until a thread comes to it, and a traceback may
        # keep this frame.
        held = [(work, arguments)]
        del work, arguments

        def run() -> Result:
            # Finds nothing if cancelled at this very moment: nobody sees that error any more.
            work, arguments = held.pop()
            return work(*arguments)

        if alone:
            pool = self._lone
        elif bulk:
            pool = self._bulk
        else:
            pool = self._slow if slow else self.interactive
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, run)
        finally:
            held.clear()

    def close(self) -> None:
        """Wait for what is at work, then end."""
        for pool in (self.interactive, self._slow, self._bulk, self._lone):
            pool.shutdown()
