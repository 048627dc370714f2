"""One segmentation from bytes to mask: admission, decode, batch, mask. No HTTP in here.

Decoding and masks run in a pool of threads, inference in the batcher's; beside small masks, and a
small photo that is alone, the event loop only passes things on. Between any two stages work is
dropped if nobody waits for it any more.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from common.stamp import ANSWERS, StampError, difference_from
from photos.image import MODEL_SIZE, Photo, is_baseline_jpeg, read_photo
from photos.image import ImageError as PhotoError
from server.backends import Backend, BackendError, BackendInfo
from server.inference.admission import Gate, Place
from server.inference.batching import FAILING, Batcher, Inference
from server.inference.budgets import PixelBudget
from server.inference.errors import ClientGone, Unavailable, of_photo_error
from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.settings import Settings

__all__ = ["Segmentation", "Service"]

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

log = logging.getLogger("slsnet.service")


@dataclass(frozen=True)
class Segmentation:
    """A photo's lesion probability, before it becomes a mask."""

    probability: NDArray[np.float32]
    """float32 [128, 128]"""
    width: int
    """Of the photo, pixels."""
    height: int
    orientation: int
    """That was applied to the photo as it is stored, 1 to 8."""
    batch_size: int
    """Photos that ran through the network together."""
    backend: BackendInfo
    """What ran it."""

    @property
    def is_small(self) -> bool:
        """Whether its mask takes no longer than to change threads."""
        return self.width * self.height <= _SMALL_PIXELS


class Service:
    """Owns the threads, the limits and the backend in use."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.closing = asyncio.Event()
        """Set when the drain's time is nearly up: no photo of several is waited for any more."""
        self.gate = Gate(settings)
        self.pixels = PixelBudget(settings.max_pixels_decoding)
        """Of photos being decoded, and of probabilities being brought to a photo's size."""
        metrics.observe(metrics.pixels_decoding, lambda: self.pixels.used)
        metrics.observe(metrics.bytes_in_flight, lambda: self.gate.body_bytes.used)
        metrics.observe(metrics.ready, lambda: self.is_ready)
        metrics.observe(metrics.circuit_open, lambda: self.is_failing)
        metrics.observe(metrics.admitted, lambda: self.gate.admitted)
        for priority, bulk in (("interactive", False), ("bulk", True)):
            metrics.observe(metrics.queue_depth.labels(priority), partial(self._waiting, bulk))
            metrics.observe(
                metrics.expected_wait_seconds.labels(priority),
                partial(self.gate.wait_s, bulk=bulk),
            )
        metrics.observe(
            metrics.queue_age_seconds,
            lambda: self._batcher.longest_wait_s() if self._batcher else 0,
        )
        threads = settings.decode_threads or settings.cores
        self.workers = ThreadPoolExecutor(threads, thread_name_prefix="work")
        # Of their own, so that no photo that somebody waits for queues up behind bulk's.
        self._bulk_workers = ThreadPoolExecutor(max(1, threads // 2), thread_name_prefix="bulk")
        self._lone_worker = ThreadPoolExecutor(1, thread_name_prefix="lone")
        self.bulk_photos = asyncio.Semaphore(settings.max_queue)
        """Photos of requests with several that are worked on, whosever they are."""
        self._batcher: Batcher | None = None
        self._networks: dict[str, Batcher] = {}
        """The last batcher of each network that serves, by what `_network` says it is."""
        self._pins: Counter[str] = Counter()
        self._retiring: set[asyncio.Task[None]] = set()

    def _waiting(self, bulk: bool) -> int:
        return self._batcher.waiting(bulk=bulk) if self._batcher else 0

    @property
    def is_ready(self) -> bool:
        """Warmed up, working, and not on the way out."""
        return self.works and not self.draining

    @property
    def backend(self) -> BackendInfo:
        """What runs the network.

        Raises:
            Unavailable: nothing does yet.
        """
        if self._batcher is None:
            raise Unavailable(_STARTING)
        return self._batcher.info

    @property
    def is_failing(self) -> bool:
        """Whether the backend fails so often in a row, or hangs, that nothing is given to it."""
        return self._batcher is not None and self._batcher.is_failing

    async def use(self, backend: Backend, on_failing: Callable[[], None] = lambda: None) -> None:
        """Warm `backend` up and let it serve from now on, in place of the one before.

        Whatever the one before has accepted it still answers; then it is closed. While requests
        have it `pinned` this does not wait for them.

        Args:
            backend: loaded.
            on_failing: called if it fails many times in a row, or hangs.

        Raises:
            BackendError: it does not work; the one before goes on.
        """
        proving = asyncio.get_running_loop().run_in_executor(self.workers, _prove, backend)
        try:
            seconds_an_image = await asyncio.shield(proving)
        except asyncio.CancelledError:

            def close(proved: asyncio.Future[float]) -> None:
                if not proved.cancelled():
                    proved.exception()
                backend.close()

            # A thread is still in it.
            proving.add_done_callback(close)
            raise
        except BaseException:
            backend.close()
            raise
        former = self._batcher
        self._batcher = Batcher(
            backend,
            self.metrics,
            max_batch=self.settings.max_batch,
            max_wait_ms=self.settings.max_wait_ms,
            on_failing=on_failing,
        )
        info = self._batcher.info
        self.gate.expect(seconds_an_image, self._batcher.max_batch)
        self.metrics.serves(info)
        log.info("ready: %s %s on %s, %s", info.name, info.version, info.device, info.precision)
        retired = [self._networks.pop(_network(self._batcher), None)]
        self._networks[_network(self._batcher)] = self._batcher
        if former is not None and former not in retired and not self._pins[_network(former)]:
            retired.append(self._networks.pop(_network(former)))
        for batcher in retired:
            if batcher is not None:
                await batcher.close()

    @contextlib.contextmanager
    def pinned(self) -> Iterator[str]:
        """The network in use: it stays available, whatever takes over meanwhile; see `infer`."""
        assert self._batcher is not None
        network = _network(self._batcher)
        self._pins[network] += 1
        try:
            yield network
        finally:
            self._pins[network] -= 1
            if not self._pins[network] and self._networks[network] is not self._batcher:
                retiring = asyncio.create_task(self._networks.pop(network).close())
                self._retiring.add(retiring)
                retiring.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Finish what was accepted, then give threads and backend back."""
        await asyncio.gather(*self._retiring, *(one.close() for one in self._networks.values()))
        self.workers.shutdown()
        self._bulk_workers.shutdown()
        self._lone_worker.shutdown()

    async def unless_closing(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` gives, if the drain's time suffices.

        Raises:
            Unavailable: it does not.
        """
        doing = asyncio.ensure_future(work)
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait((doing, closing), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise Unavailable(_GOING_DOWN)
            return await doing
        finally:
            doing.cancel()
            closing.cancel()
            # Its exception's traceback has this frame: they would keep each other, and a photo.
            del doing

    @property
    def works(self) -> bool:
        """Whether there is a network, and it does not fail all the time."""
        return self._batcher is not None and not self._batcher.is_failing

    def check_works(self) -> None:
        """Raises:
        Unavailable: no backend is ready, or it fails all the time.
        """
        if self._batcher is None:
            raise Unavailable(_STARTING)
        if self._batcher.is_failing:
            raise Unavailable(FAILING)

    def check_ready(self) -> None:
        """Raises:
        Unavailable: requests are not served, or are better sent elsewhere.
        """
        self.check_works()
        if self.draining:
            raise Unavailable(_GOING_DOWN)

    @contextlib.contextmanager
    def admission(self, *, deadline: float, bulk: bool = False) -> Iterator[Place]:
        """A place among the requests being worked on; see `Gate.enter`.

        Raises:
            Unavailable: no backend is ready.
            Overloaded: there is no room, or not in time.
        """
        self.check_works()
        with self.gate.enter(deadline=deadline, bulk=bulk) as place:
            yield place

    async def segment(
        self,
        read: Callable[[], bytes],
        *,
        stages: Stages,
        deadline: float,
        is_gone: Callable[[], bool],
        bulk: bool = False,
        network: str | None = None,
        bare: Sequence[bytes] = (),
    ) -> Segmentation:
        """A photo → the lesion probability of its pixels.

        Args:
            read: gives the photo's bytes, or raises what is wrong with them; called once, in a
                thread. It has to give them away: else whoever called, and tracebacks, would hold
                them for longer than they count.
            stages: told when decode, queue and infer are over.
            deadline: second of `time.perf_counter` after which the network is not run.
            is_gone: whether the client hung up.
            bulk: others go first.
            network: that `pinned` gave; else the one in use.
            bare: the body that `read` takes from, where it holds the photo as it came; a small one
                that is alone is decoded without changing threads.

        Raises:
            Problem: whatever is wrong with the request or its photo.
            ClientGone: `is_gone` said so between two stages.
        """
        try:
            photo = None if bulk or not bare else self._decode_here(bare[0])
            if photo is None:
                photo = await self.in_thread(self._decode, read, is_gone, bulk=bulk)
            if is_gone():
                raise ClientGone
        except ClientGone:
            self.metrics.dropped.labels("client_gone").inc()
            raise
        stages.end("decode")
        (inference,), backend = await self.infer(
            [photo.pixels], deadline=deadline, is_gone=is_gone, bulk=bulk, network=network
        )
        stages.end("queue", inference.started)
        stages.end("infer", inference.ended)
        if is_gone():
            raise ClientGone
        return Segmentation(
            inference.probability,
            photo.width,
            photo.height,
            photo.orientation,
            inference.batch_size,
            backend,
        )

    async def infer(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        deadline: float,
        is_gone: Callable[[], bool],
        bulk: bool,
        network: str | None = None,
    ) -> tuple[list[Inference], BackendInfo]:
        """Images of one request through the network, and what ran all of them.

        Args:
            images: each uint8 [128, 128, 3].
            deadline, is_gone, bulk: as for `Batcher.submit`.
            network: that `pinned` gave; else the one in use.

        Raises:
            DeadlineExceeded, ClientGone, InferenceFailed, Unavailable: of whichever image it was
                first.
        """
        # Looked up only now: while a photo was decoded another backend may have come into use.
        batcher = self._networks[network] if network is not None else self._batcher
        assert batcher is not None
        results = batcher.submit(images, deadline=deadline, is_gone=is_gone, bulk=bulk)
        try:
            return await asyncio.gather(*results), batcher.info
        finally:
            # None is kept: an exception's traceback has this frame, and so would keep itself.
            while results:
                results.pop().cancel()

    async def in_thread(
        self,
        work: Callable[[*Arguments], Result],
        *arguments: *Arguments,
        bulk: bool = False,
        alone: bool = False,
    ) -> Result:
        """Run `work` in a pool, where it does not hold up the event loop.

        If this is cancelled, work that waits for a thread is let go, and its arguments with it;
        work that has begun goes on to its end.

        Args:
            work, arguments: what to call, and with what.
            bulk: others go first.
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

        pool = self._lone_worker if alone else self._bulk_workers if bulk else self.workers
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, run)
        finally:
            held.clear()

    @property
    def has_one(self) -> bool:
        """Whether one request is there alone, so that work on the event loop holds up nobody."""
        return self.gate.admitted == 1

    def _decode_here(self, data: bytes) -> Photo | None:
        """A lone small photo, on the event loop: to change threads takes a fifth of its time.

        None for what may take longer than a few milliseconds, and for what is wrong.
        """
        if not self.has_one or len(data) > _SMALL_BYTES:
            return None
        try:
            return read_photo(data, max_pixels=_SMALL_PIXELS) if is_baseline_jpeg(data) else None
        except PhotoError:
            return None

    def _decode(self, read: Callable[[], bytes], is_gone: Callable[[], bool]) -> Photo:
        if is_gone():
            raise ClientGone
        try:
            return read_photo(
                read(),
                max_pixels=self.settings.max_pixels,
                room=self.pixels.room,
            )
        except PhotoError as error:
            raise of_photo_error(error) from error


# Of a photo that is worked on without a change of threads where nobody else is there.
_SMALL_PIXELS = 2**19
_SMALL_BYTES = 2**17


def _network(batcher: Batcher) -> str:
    """What tells it from others: the bytes that it was loaded from, or else this one load.

    Not its metadata: that is only what a file says of itself.
    """
    return batcher.info.file_sha256 or f"load {id(batcher)}"


# From the answers that a network had when it was exported, in probability: bfloat16 and float16
# stay within a tenth of it, and eight bits are held to masks when their engine is built.
_MOST_DIFFERENCE = 0.05
_MOST_DIFFERENCE_INT8 = 0.25


def _prove(backend: Backend) -> float:
    """Seconds that an image takes where as many come as run at the same time.

    BackendError unless the answers are probabilities, and those that the file says they were.
    """
    backend.warm_up()
    image = np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
    slots = backend.describe().slots
    taken_s = math.inf
    with ThreadPoolExecutor(slots) as threads:
        # The quickest of three: on a busy machine one alone may take many times as long.
        for _ in range(3):
            started = time.perf_counter()
            *_, probability = threads.map(backend.infer, [image] * slots)
            taken_s = min(taken_s, time.perf_counter() - started)
    if (
        probability.shape != (1, MODEL_SIZE, MODEL_SIZE)
        or not ((probability >= 0) & (probability <= 1)).all()
    ):
        raise BackendError("The network's answers are not probabilities.")
    _prove_answers(backend)
    return taken_s / slots


def _prove_answers(backend: Backend) -> None:
    info = backend.describe()
    answers = info.model.get(ANSWERS)
    if answers is None:
        return
    most = _MOST_DIFFERENCE_INT8 if info.precision == "int8" else _MOST_DIFFERENCE
    try:
        difference = difference_from(answers, backend.infer)
    except StampError as error:
        raise BackendError(f"The network cannot be held to its stored answers: {error}.") from error
    if not difference <= most:
        raise BackendError(
            f"On the trial images the network's answers differ by {difference:.2f} in probability"
            " from those stored when it was exported: it is not the network that it was."
        )


_GOING_DOWN = "The server is going down: send requests to another one."
_STARTING = "The network is still being loaded. Try again when GET /health/ready answers 200."
