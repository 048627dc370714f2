"""The work on this machine."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.backends import BackendInfo
from server.bulk.ledger import Row, Task
from server.bulk.segmenter import Options, PhotoSegmenter
from server.settings import Settings

__all__ = ["Record", "Runner", "this_machine"]

Record = Callable[[str, Row], None]
"""Called with each photo's path and row as soon as they are known."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Runner:
    """Segments photos, on this machine or on a cluster."""

    info: BackendInfo
    """The backend that it uses."""
    run: Callable[[Iterator[Task], Record], int]
    """Run the tasks, some at a time. Returns 0, or the signal that stopped it: photos at work are
    finished then, and a second signal ends the process. Raises BulkError if the network fails on
    every photo."""


@contextlib.contextmanager
def this_machine(settings: Settings, options: Options, root: Path, masks: Path) -> Iterator[Runner]:
    """Load the network here; arguments are those of `PhotoSegmenter`.

    Raises:
        BackendError: it cannot be loaded.
    """
    segmenter = PhotoSegmenter(settings, options, root, masks)
    with asyncio.Runner() as runner:
        try:
            info = runner.run(segmenter.open())
            yield Runner(info, lambda tasks, record: runner.run(_run(segmenter, tasks, record)))
        finally:
            runner.run(segmenter.close())


async def _run(segmenter: PhotoSegmenter, tasks: Iterator[Task], record: Record) -> int:
    loop = asyncio.get_running_loop()
    stopped_by = 0

    def stop(number: int) -> None:
        nonlocal stopped_by
        stopped_by = number
        for each in _SIGNALS:
            loop.remove_signal_handler(each)

    async def work() -> None:
        for task in tasks:
            record(task.path, await segmenter.segment(task))
            if stopped_by:
                break

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    workers = [asyncio.create_task(work()) for _ in range(segmenter.at_work)]
    try:
        await asyncio.gather(*workers)
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
    return stopped_by
