"""Idle-aware batching: start at once while the network is idle, gather while it is busy.

A request that finds a free slot of the backend runs at once, alone. While all slots are busy,
requests wait together, and the next free slot takes up to `max_batch` of them. So a lone request
pays nothing for batching, and load fills the batches by itself. Nothing is polled: work is handed
out when a request arrives and when a slot becomes free.

Interactive photos go before bulk ones. Bulk photos take the padding of a batch, and slots that are
free, in runs so short that the next photo hardly waits. One bulk photo runs for every eight
interactive ones, so that bulk never starves.

It is hand-written because libraries for batching (mosec, Ray Serve, Triton) are servers of their
own, and wait a fixed time for a batch to fill.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from photos.fitness import Detector
from photos.quality import QualityTable
from server.backends import Backend, BackendError
from server.backends.threads import DaemonThreads
from server.inference.errors import ClientGone, DeadlineExceeded, InferenceFailed, Unavailable
from server.observe.metrics import Metrics
from server.settings import DEFAULT_NETWORK

__all__ = [
    "FAILED_TWICE",
    "FAILING",
    "FAILURES",
    "HUNG_S",
    "INTERACTIVE_PER_BULK",
    "TOO_LATE",
    "Batcher",
    "Inference",
    "Item",
    "Request",
    "is_wanted",
    "items_of",
]

log = logging.getLogger("slsnet.batching")

FAILURES = 5
"""A batch that fails and its retry can be one photo's fault; after this many runs in a row that
failed, the backend is at fault."""

FAILING = "The network does not work and is being loaded anew."
"""What clients are told then."""

TOO_LATE = "The deadline passed before the photo reached the network."
"""What a client is told whose photo waited too long."""

FAILED_TWICE = "The network failed on this photo twice."
"""What a client is told on whose photo the network fails."""

INTERACTIVE_PER_BULK = 8
"""While both kinds wait, so many interactive photos run for one bulk photo."""

BULK_RUN_S = 0.1
"""Seconds that a run of bulk photos alone should take: it cannot be interrupted."""

HUNG_S = 30.0
"""A run hangs if it takes longer than this, and `_HUNG_TIMES` as long as was expected."""

_HUNG_TIMES = 20
# The clock is read so often meanwhile that a process that was stopped for a while counts one step.
_LOOKS = 10


@dataclass(frozen=True)
class Inference:
    """The network's answer for one photo, and when it ran (seconds of `time.perf_counter`)."""

    probability: NDArray[np.float32]
    """float32 [128, 128]"""
    started: float
    ended: float
    batch_size: int


class Request:
    """Its photos have one answer together: the first that fails is the answer of all."""

    def __init__(self, photos: int, deadline: float, is_gone: Callable[[], bool]) -> None:
        self.deadline = deadline
        self.is_gone = is_gone
        self.arrived = time.perf_counter()
        self.result: asyncio.Future[list[Inference]]
        self.result = asyncio.get_running_loop().create_future()
        self._answers: list[Inference | None] = [None] * photos
        self._missing = photos

    def answer(self, place: int, inference: Inference) -> None:
        if self.result.done():
            return
        self._answers[place] = inference
        self._missing -= 1
        if not self._missing:
            self.result.set_result([answer for answer in self._answers if answer is not None])

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


@dataclass(eq=False)
class Item:
    """One of a request's photos, which runs with others' as the batches come out."""

    pixels: NDArray[np.uint8]
    request: Request
    place: int


def items_of(
    images: Sequence[NDArray[np.uint8]], deadline: float, is_gone: Callable[[], bool]
) -> tuple[Request, list[Item]]:
    """A request with so many photos, and its photos; arguments as for `Batcher.submit`."""
    request = Request(len(images), deadline, is_gone)
    return request, [Item(pixels, request, place) for place, pixels in enumerate(images)]


def is_wanted(item: Item, metrics: Metrics) -> bool:
    """Whether this photo still has to run; if not, its request and `metrics` get the reason."""
    request = item.request
    if request.result.done():
        if time.perf_counter() >= request.deadline:
            reason = "deadline"
        else:
            # Otherwise another photo of the request failed, or it was given up.
            reason = "client_gone" if request.is_gone() else "abandoned"
        metrics.dropped.labels(reason).inc()
        return False
    if request.is_gone():
        metrics.dropped.labels("client_gone").inc()
        request.fail(ClientGone())
        return False
    if time.perf_counter() >= request.deadline:
        metrics.dropped.labels("deadline").inc()
        request.fail(DeadlineExceeded(TOO_LATE))
        return False
    return True


class Batcher:
    """Feeds one backend from one event loop; `submit` is called on that loop."""

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        *,
        max_batch: int = 0,
        max_wait_ms: float = 0,
        on_failing: Callable[[], None] = lambda: None,
        quality: QualityTable | None = None,
        detector: Detector | None = None,
        name: str = DEFAULT_NETWORK,
    ) -> None:
        """Start the threads in which `backend` runs.

        Args:
            backend: loaded and warmed up.
            metrics: told of batch sizes, drops and failures.
            max_batch: 0 for the backend's own.
            max_wait_ms: how long an idle backend waits for a batch to fill.
            on_failing: called once, when the backend has failed `FAILURES` times in a row, or
                hangs.
            quality: what turns its probabilities into a mask's quality.
            detector: what tells pictures that are no dermoscopic photos.
            name: the network's, in the metrics.
        """
        self.info = info = replace(backend.describe(), quality=quality, detector=detector)
        self._backend = backend
        self._metrics = metrics
        self._photos = metrics.network_photos.labels(name)
        self._run_seconds = metrics.network_seconds.labels(name)
        self.max_batch = max_batch or info.max_batch
        """The most photos that run together."""
        if info.buckets:
            self.max_batch = min(self.max_batch, info.buckets[-1])
        self._buckets = info.buckets
        # Where photos run one by one, the next is handed over while all slots are busy. So the
        # thread that comes free begins at once, and does not wait for the event loop.
        self._most_begun = info.slots + (1 if self.max_batch == 1 else 0)
        self._max_wait_s = max_wait_ms / 1000
        self._interactive: deque[Item] = deque()
        self._bulk: deque[Item] = deque()
        self._interactive_since_bulk = 0
        self._running: set[asyncio.Task[None]] = set()
        self._last_run = time.perf_counter()
        self._timer: asyncio.TimerHandle | None = None
        self._threads = DaemonThreads(info.slots, "infer")
        self._on_failing = on_failing
        self._failures = 0
        self._is_failing = False
        self._hung = False
        self.seconds_per_image = 0.0
        """Moving average of the backend's time for a photo."""

    def submit(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        deadline: float,
        is_gone: Callable[[], bool] = lambda: False,
        bulk: bool = False,
    ) -> asyncio.Future[list[Inference]]:
        """Queue the pixels of a request's photos, each by itself.

        Args:
            images: one at least, each uint8 [128, 128, 3].
            deadline: second of `time.perf_counter` after which they are not run.
            is_gone: whether the client has left; asked when a batch is formed.
            bulk: let interactive photos go first.

        Returns:
            Their answers; if it is cancelled, they leave the queue. Or the first failure:

            DeadlineExceeded: the deadline passed while they waited.
            ClientGone: `is_gone` said so.
            InferenceFailed: the backend failed on a photo in its batch and again alone.
            Unavailable: the backend keeps failing, or a run does not come back.
        """
        request, items = items_of(images, deadline, is_gone)
        (self._bulk if bulk else self._interactive).extend(items)
        self._dispatch()
        return request.result

    @property
    def is_failing(self) -> bool:
        """Whether the backend failed `FAILURES` times in a row, or hangs; this is never undone."""
        return self._is_failing

    def waiting(self, *, bulk: bool) -> int:
        """Photos in the queue."""
        return len(self._bulk if bulk else self._interactive)

    def longest_wait_s(self) -> float:
        """The longest time that a photo in the queue has waited up to now."""
        heads = [queue[0].request.arrived for queue in (self._interactive, self._bulk) if queue]
        return time.perf_counter() - min(heads) if heads else 0.0

    def idle_s(self) -> float:
        """Seconds since an image last ran, or since there is this batcher."""
        return 0.0 if self._running else time.perf_counter() - self._last_run

    async def close(self) -> None:
        """Finish what is queued and running, then close the backend, unless it hangs."""
        self._max_wait_s = 0
        self._dispatch()
        while self._running:
            await asyncio.wait(self._running)
        self._threads.close()
        if not self._hung:
            # If it hangs, a thread is still in it.
            self._backend.close()

    def _dispatch(self) -> None:
        if self._is_failing:
            for queue in (self._interactive, self._bulk):
                while queue:
                    _refuse(queue.popleft())
        while len(self._running) < self._most_begun and (self._interactive or self._bulk):
            if self._should_wait():
                return
            batch = self._next_batch()
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch))
                self._running.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._last_run = time.perf_counter()
        self._dispatch()

    def _should_wait(self) -> bool:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        queues = [queue for queue in (self._interactive, self._bulk) if queue]
        if sum(len(queue) for queue in queues) >= self.max_batch:
            return False
        oldest = min(queue[0].request.arrived for queue in queues)
        remaining = oldest + self._max_wait_s - time.perf_counter()
        if remaining <= 0:
            return False
        self._timer = asyncio.get_running_loop().call_later(remaining, self._dispatch)
        return True

    def _next_batch(self) -> list[Item]:
        batch: list[Item] = []
        self._fill(batch, self._bulk, self._interactive_since_bulk // INTERACTIVE_PER_BULK)
        turns = len(batch)
        self._fill(batch, self._interactive, self.max_batch)
        interactive = len(batch) - turns
        seats = min(self._bucket(len(batch)), self.max_batch) if batch else self._bulk_run()
        self._fill(batch, self._bulk, seats)
        if len(batch) > turns + interactive or not self._bulk:
            self._interactive_since_bulk = 0
        else:
            self._interactive_since_bulk += interactive - turns * INTERACTIVE_PER_BULK
        return batch

    def _fill(self, batch: list[Item], queue: deque[Item], size: int) -> None:
        while queue and len(batch) < size:
            item = queue.popleft()
            if is_wanted(item, self._metrics):
                batch.append(item)

    def _bulk_run(self) -> int:
        """As many photos as take about `BULK_RUN_S`; one while that is not known."""
        if not self.seconds_per_image:
            return 1
        size = max(1, min(self.max_batch, int(BULK_RUN_S / self.seconds_per_image)))
        return max((bucket for bucket in self._buckets if bucket <= size), default=size)

    def _bucket(self, images: int) -> int:
        """The size of batch that so many photos run in."""
        return next((size for size in self._buckets if size >= images), images)

    async def _run(self, batch: list[Item]) -> None:
        try:
            await self._infer(batch)
        except Exception:
            # One photo may be the cause, so each runs again, alone.
            log.exception("inference failed on a batch of %d, retrying one by one", len(batch))
            self._metrics.batch_failures.inc()
            for item in batch:
                if self._is_failing:
                    _refuse(item)
                elif is_wanted(item, self._metrics):
                    await self._retry(item)

    async def _retry(self, item: Item) -> None:
        try:
            await self._infer([item])
        except Exception as error:
            log.exception("inference failed on a single image")
            if self._hung:
                _refuse(item)
            else:
                failure = InferenceFailed(FAILED_TWICE)
                failure.__cause__ = error
                item.request.fail(failure)

    async def _infer(self, batch: list[Item]) -> None:
        try:
            started, ended, probabilities = await self._in_time(batch)
        except Exception:
            self._failures += 1
            if self._failures >= FAILURES:
                self._fail()
            raise
        self._failures = 0
        self._metrics.batch_size.observe(len(batch))
        self._photos.inc(len(batch))
        self._run_seconds.inc(ended - started)
        self._metrics.padding.inc(self._bucket(len(batch)) - len(batch))
        per_image = (ended - started) / len(batch)
        self.seconds_per_image += (per_image - self.seconds_per_image) * (
            0.1 if self.seconds_per_image else 1
        )
        for item, probability in zip(batch, probabilities, strict=True):
            item.request.answer(item.place, Inference(probability, started, ended, len(batch)))

    async def _in_time(self, batch: list[Item]) -> tuple[float, float, NDArray[np.float32]]:
        """The result of `_call_backend`; BackendError if it does not come back."""
        images = [item.pixels for item in batch]
        running = asyncio.wrap_future(self._threads.submit(lambda: self._call_backend(images)))
        expected_s = self.seconds_per_image * self._bucket(len(batch))
        limit_s = max(HUNG_S, _HUNG_TIMES * expected_s)
        for _ in range(_LOOKS):
            await asyncio.wait([running], timeout=limit_s / _LOOKS)
            if running.done():
                return running.result()
        self._hung = True
        self._fail()
        raise BackendError(f"The backend has not come back for {limit_s:g} s.")

    def _fail(self) -> None:
        """Give the backend no more work, and fail all photos that wait for it."""
        if not self._is_failing:
            self._is_failing = True
            self._dispatch()
            self._on_failing()

    def _call_backend(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> tuple[float, float, NDArray[np.float32]]:
        """Run in a thread: pixels → start, end (s), probabilities float32 [n, 128, 128]."""
        started = time.perf_counter()
        probabilities = self._backend.infer(images)
        if len(probabilities) != len(images) or not np.isfinite(probabilities).all():
            raise BackendError("The backend's answer is not one finite map for each image.")
        return started, time.perf_counter(), probabilities


def _refuse(item: Item) -> None:
    item.request.fail(Unavailable(FAILING))
