"""Takes each object of the journal through its stages, and again after failures.

Each stage has workers of its own, so that an archive that is slow or down keeps nothing from being
segmented, and a server that is down keeps no result from being delivered.
"""

import asyncio
import contextlib
import logging
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.archive.failures import Failure
from server.archive.journal import SEGMENT, Journal, JournalFull, Task
from server.archive.metrics import Metrics
from server.archive.segmenting import SegmentingServer

__all__ = ["Destination", "Patience", "Relay"]

log = logging.getLogger("slsnet.archive")

# Seconds after which a worker without work looks again: a task whose pause is over, or that a
# command gave another try, rings no bell.
_LOOK_S = 1.0


class Destination(Protocol):
    """Where results go."""

    async def store(self, contents: Sequence[bytes]) -> None:
        """Store objects; those that it has are left as they are.

        Raises:
            Failure: it does not hold all of them.
        """

    async def aclose(self) -> None:
        """Close the connections."""


@dataclass(frozen=True)
class Patience:
    """When to try again."""

    first_s: float = 1
    """Pause after the first failure; each next is twice as long."""
    longest_s: float = 60
    give_up_s: float = 72 * 3600
    """Seconds of failures, after which a person is needed."""

    def pause_s(self, attempts: int) -> float:
        """Seconds until the next attempt, after so many before this one."""
        return min(self.longest_s, self.first_s * 2.0 ** min(attempts, 30)) * random.uniform(0.5, 1)


class Relay:
    """Works on a journal.

    Args:
        journal: what there is to do.
        segmenter: makes results of photos.
        destinations: where results go, by the names of their stages.
        metrics: counts attempts.
        patience: when to try again.
        at_work: tasks of one stage at a time.
    """

    def __init__(
        self,
        journal: Journal,
        segmenter: SegmentingServer,
        destinations: Mapping[str, Destination],
        metrics: Metrics,
        *,
        patience: Patience | None = None,
        at_work: int = 2,
    ) -> None:
        self._journal = journal
        self._segmenter = segmenter
        self._destinations = destinations
        self._metrics = metrics
        self._patience = patience or Patience()
        self._at_work = at_work
        self._bells = {stage: asyncio.Event() for stage in (SEGMENT, *destinations)}
        self._stopping = False

    def arrived(self) -> None:
        """There is a new object; call it on the event loop."""
        self._bells[SEGMENT].set()

    @contextlib.asynccontextmanager
    async def working(self, grace_s: float = 10) -> AsyncIterator[None]:
        """Work while the block runs; then finish attempts for so many seconds, and close all."""
        buried = await asyncio.to_thread(self._journal.bury_others, self._bells.keys())
        if buried:
            log.warning("%d deliveries have no destination any more", buried)
        workers = [
            asyncio.create_task(self._work(stage), name=stage)
            for stage in self._bells
            for _ in range(self._at_work)
        ]
        try:
            yield
        finally:
            self._stopping = True
            for bell in self._bells.values():
                bell.set()
            await asyncio.wait(workers, timeout=grace_s)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._segmenter.aclose()
            for destination in self._destinations.values():
                await destination.aclose()

    async def _work(self, stage: str) -> None:
        bell = self._bells[stage]
        while not self._stopping:
            bell.clear()
            try:
                task = await asyncio.to_thread(self._journal.claim, stage)
                if task is not None:
                    await self._attempt(task)
                    continue
            except (sqlite3.Error, JournalFull) as error:
                # What is in it is tried again once the disk is well.
                log.error("the journal fails: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), _LOOK_S)

    async def _attempt(self, task: Task) -> None:
        try:
            try:
                if task.stage == SEGMENT:
                    await self._segment(task)
                else:
                    await self._deliver(task)
            except Failure as failure:
                await self._failed(task, failure)
            except JournalFull as full:
                await self._failed(task, Failure("journal_full", str(full)))
            except sqlite3.Error:
                raise
            except Exception as error:  # noqa: BLE001 - one object must not stop all others
                # Only its kind: what a library says of an object may have a name in it.
                kind = type(error).__name__
                await self._failed(task, Failure("unexpected", f"A fault: {kind}.", final=True))
            else:
                self._metrics.attempts.labels(task.stage, "ok").inc()
        finally:
            self._journal.release(task)

    async def _segment(self, task: Task) -> None:
        (photo,) = await asyncio.to_thread(self._journal.contents, task)
        results = await self._segmenter.segment(photo)
        await asyncio.to_thread(self._journal.segmented, task, results, [*self._destinations])
        log.info("object %d is segmented: %d results", task.object, len(results))
        for stage in self._destinations:
            self._bells[stage].set()

    async def _deliver(self, task: Task) -> None:
        results = await asyncio.to_thread(self._journal.contents, task)
        await self._destinations[task.stage].store(results)
        if await asyncio.to_thread(self._journal.delivered, task):
            self._metrics.delivered.inc()
            log.info("object %d is delivered, and erased", task.object)

    async def _failed(self, task: Task, failure: Failure) -> None:
        self._metrics.attempts.labels(task.stage, failure.reason).inc()
        patience = self._patience
        pause_s = max(patience.pause_s(task.attempts), failure.retry_after_s)
        over = failure.final or time.time() + pause_s - task.since > patience.give_up_s
        await asyncio.to_thread(
            self._journal.failed,
            *(task, failure.reason, failure.detail),
            None if over else pause_s,
        )
        say = log.error if over else log.warning
        say(
            "object %d, %s: %s (%s), %s",
            *(task.object, task.stage, failure.detail, failure.reason),
            "no further attempt" if over else f"again in {pause_s:.1f} s",
        )
