"""The work on a Ray cluster (Ray Data): each of its actors loads the network once.

Every node has this project, the network file, the photos and the folder of masks under the same
paths. Actors write the masks; only paths and rows travel. If an actor dies, Ray runs its photos
again, and their masks are replaced by the same ones.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.util import placement_group, remove_placement_group

from server.backends import BackendError, BackendInfo, open_backend
from server.bulk.ledger import Row, Task
from server.bulk.local import Record, Runner
from server.bulk.segmenter import Options, PhotoSegmenter
from server.bulk.sources import BulkError
from server.settings import Settings

__all__ = ["on_ray"]

# Photos that an actor gets at a time. They are run again if it dies.
_BLOCK = 16

# Photos of one data set: it is in memory, and setting one up takes seconds.
_WINDOW = 50_000

# Attempts at a block, or a photo, whose actor died.
_RETRIES = 2

# Failures of a data set: with more, something other than photos is wrong.
_LOST_BLOCKS = 100

_CONNECT_S = 10

# Seconds after which it tells that there is no room.
_ROOM_S = 5

_PATH, _ROW, _STOP = "path", "row", "stop"

Result = TypeVar("Result")


@contextlib.contextmanager
def on_ray(
    settings: Settings, options: Options, root: Path, masks: Path, *, address: str, gpus: float
) -> Iterator[Runner]:
    """The cluster at `address`, as `ray.init` takes it; the rest is as for `PhotoSegmenter`.

    Args:
        settings: `threads` is also how many CPUs an actor asks for; 0 is one.
        options, root, masks: as for `PhotoSegmenter`.
        address: `auto`, `local`, `HOST:PORT` or `ray://HOST:PORT`.
        gpus: GPUs that an actor asks for.

    Raises:
        BackendError: the network cannot be loaded.
        BulkError: there is no such cluster, or it lacks what an actor asks for.
    """
    info = _describe(settings)
    _start(address)
    try:
        cpus = settings.threads or 1
        own = settings.model_copy(update={"threads": cpus, "decode_threads": cpus})
        weights = info.model.get("weights_sha256", "")
        segmented = functools.partial(
            ray.data.Dataset.map_batches,
            fn=_Actor,
            fn_constructor_args=(own, options, root, masks, weights),
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=gpus,
            max_task_retries=_RETRIES,
        )
        pool = functools.partial(
            ray.data.ActorPoolStrategy, min_size=1, max_size=_actors(cpus, gpus)
        )
        yield Runner(info, functools.partial(_run, segmented, pool))
    finally:
        ray.shutdown()


def _describe(settings: Settings) -> BackendInfo:
    backend = open_backend(settings.backend, settings.model, threads=1)
    try:
        return backend.describe()
    finally:
        backend.close()


def _start(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        # Ray itself would try for minutes.
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except OSError as error:
            raise BulkError(f"There is no Ray cluster at {address}: {error}") from error
    # A cluster that is started here reports nothing elsewhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    print(f"connecting to Ray ({address})", file=sys.stderr)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    # RuntimeError: for example, the cluster has another version.
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise BulkError(f"Ray's cluster ({address}) cannot be used: {error}") from error
    context = ray.data.DataContext.get_current()
    # Ray's bars and notes would disturb this program's own.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Photos without a row are run again, one by one.
    context.max_errored_blocks = _LOST_BLOCKS
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _actors(cpus: int, gpus: float) -> int:
    """The number of actors that the cluster has room for; wait until one fits."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    room = sum(
        int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else math.inf))
        for node in nodes
    )
    asked = f"{cpus} CPUs and {gpus:g} GPUs (--threads, --ray-gpus)"
    if room < 1:
        found = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise BulkError(
            f"One actor asks for {asked} of a node; the cluster's nodes have, in all: {found}."
        )
    group = placement_group([{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}])
    if not group.wait(_ROOM_S):
        print(f"waiting for a node with {asked} to spare", file=sys.stderr)
        while not group.wait(_ROOM_S):
            pass
    remove_placement_group(group)
    return room


def _run(
    segmented: Callable[..., ray.data.Dataset],
    pool: Callable[..., ray.data.ActorPoolStrategy],
    tasks: Iterator[Task],
    record: Record,
) -> int:
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signals.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    def go_through(window: list[Task], block: int, compute: ray.data.ActorPoolStrategy) -> None:
        """Run the photos in `window`, and leave in it those without a row."""
        left = {task.path: task for task in window}
        blocks = list(_blocks(iter(window), block))
        # It is told again: otherwise Ray joins small blocks, and refuses GPUs.
        rows = segmented(ray.data.from_arrow(blocks), compute=compute, batch_size=block)
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for path, row in _rows(batch):
                record(path, row)
                del left[path]
            if signals:
                break
        window[:] = left.values()

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not signals and (window := list(itertools.islice(tasks, _WINDOW))):
            go_through(window, _BLOCK, pool())
            if window and not signals:
                # One at a time, so that no photo fails for what another one does.
                go_through(window, 1, pool(max_tasks_in_flight_per_actor=1))
            if not signals:
                for task in window:
                    record(task.path, Row("failed", f"{_RETRIES + 1} actors died at work on it"))
    except ray.exceptions.RayError as error:
        raise BulkError(f"Ray gave up: {error}") from error
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return signals[0] if signals else 0


def _blocks(tasks: Iterator[Task], size: int) -> Iterator[pa.Table]:
    while block := list(itertools.islice(tasks, size)):
        # Paths travel as bytes, since names need not be UTF-8.
        yield pa.table(
            {
                _PATH: [os.fsencode(task.path) for task in block],
                "mask": [os.fsencode(task.mask) for task in block],
            }
        )


def _rows(batch: pa.Table) -> Iterator[tuple[str, Row]]:
    for line in batch.to_pylist():
        if line[_STOP]:
            raise BulkError(line[_STOP])
        yield os.fsdecode(line[_PATH]), Row(**json.loads(line[_ROW]))


class _Actor:
    """Runs in one actor, which gets a block of photos at a time."""

    def __init__(
        self, settings: Settings, options: Options, root: Path, masks: Path, weights: str
    ) -> None:
        # Ray calls from a thread of its own; the network's event loop runs in another.
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._segmenter = PhotoSegmenter(settings, options, root, masks)
        info = self._do(self._segmenter.open())
        if info.model.get("weights_sha256") != weights:
            raise BackendError(f"{settings.model} is another network here than where it started.")
        if not masks.is_dir():
            raise NotADirectoryError(f"{masks} is not there: every node needs it.")

    def _do(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __call__(self, block: pa.Table) -> pa.Table:
        tasks = [
            Task(os.fsdecode(line[_PATH]), os.fsdecode(line["mask"])) for line in block.to_pylist()
        ]
        rows = self._do(self._segment(tasks))
        return pa.table(
            {
                _PATH: block[_PATH],
                _ROW: [
                    json.dumps(None if isinstance(row, BulkError) else asdict(row)) for row in rows
                ],
                _STOP: [str(row) if isinstance(row, BulkError) else "" for row in rows],
            }
        )

    async def _segment(self, tasks: list[Task]) -> list[Row | BulkError]:
        async def segment(task: Task) -> Row | BulkError:
            try:
                return await self._segmenter.segment(task)
            except BulkError as error:
                # The error is handed over: otherwise Ray would start actors that fail too.
                return error
            except Exception as error:  # noqa: BLE001
                # It is handed over too: Ray would take it for an actor's death.
                return BulkError(f"a fault of this program: {error!r}")

        return await asyncio.gather(*map(segment, tasks))
