"""Threads that do not delay the end of the process: one may be stuck in a driver.

The standard library's pool waits for its threads at exit.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["DaemonThreads"]

Result = TypeVar("Result")


class DaemonThreads:
    """Threads that take calls in order; the end of the process does not wait for them."""

    def __init__(self, count: int, name: str) -> None:
        """Start them; each is called `name` with its number."""
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Call `work` in the next thread that is free."""
        future: Future[Result] = Future()
        self._work.put((future, work))
        return future

    def close(self) -> None:
        """Let the threads end once they are idle."""
        for _ in range(self._count):
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  # it goes to who waits
                future.set_exception(error)
            # Otherwise the last batch would stay in memory until the next one.
            del item, future, work
