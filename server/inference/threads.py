"""Threads for work that would hold up the event loop: decoding, encoding, loading."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

__all__ = ["Threads"]

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Threads:
    """Pools of threads: for interactive photos, slow ones, bulk, and work done one at a time."""

    def __init__(self, count: int) -> None:
        """Make the pools; no thread starts before it is needed.

        Args:
            count: threads of the first pool; bulk has half as many.
        """
        self.interactive = ThreadPoolExecutor(count, thread_name_prefix="work")
        # No interactive photo queues up behind bulk.
        self._bulk = ThreadPoolExecutor(max(1, count // 2), thread_name_prefix="bulk")
        # Photos that take seconds never have all threads.
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
        """Run `work` in a pool.

        If this is cancelled, work that still waits for a thread is dropped with its arguments; work
        that has begun goes on to its end.

        Args:
            work, arguments: what to call, and with what.
            bulk: interactive requests go first.
            slow: it may take seconds.
            alone: only one of those with `alone` runs at a time, also after one was cancelled.
        """
        # The pool's queue keeps cancelled work until a thread comes to it, and a traceback may keep
        # this frame.
        held = [(work, arguments)]
        del work, arguments

        def run() -> Result:
            # Finds nothing if it was cancelled at this very moment; nobody sees that error.
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
        """Wait for running work, then end the threads."""
        for pool in (self.interactive, self._slow, self._bulk, self._lone):
            pool.shutdown()
