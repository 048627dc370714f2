"""One segmentation from bytes to mask: admission, decode, batch, mask. No HTTP in here.

Decoding and masks run in a pool of threads, inference in the batcher's; beside small masks, and a
small photo that is alone, the event loop only passes things on. Between any two stages work is
dropped if nobody waits for it any more.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from photos.image import ImageError as PhotoError
from photos.image import Photo, is_baseline_jpeg, read_photo
from server.backends import Backend, BackendInfo
from server.inference.admission import Gate, Place
from server.inference.batching import Batcher
from server.inference.budgets import PixelBudget
from server.inference.errors import ClientGone, Unavailable, of_photo_error
from server.inference.networks import Networks
from server.inference.proving import proved
from server.inference.threads import Threads
from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.settings import Settings

__all__ = ["Segmentation", "Service"]

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
    """Owns the limits, the threads and the networks in use."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.closing = asyncio.Event()
        """Set when the drain's time is nearly up: no photo of several is waited for any more."""
        self.gate = Gate(settings)
        self.pixels = PixelBudget(settings.max_pixels_decoding)
        """Of photos being decoded, and of probabilities being brought to a photo's size."""
        self.threads = Threads(settings.decode_threads or settings.cores)
        self.networks = Networks()
        self.bulk_photos = asyncio.Semaphore(settings.max_queue)
        """Photos of requests with several that are worked on, whosever they are."""
        self._observe(metrics)

    def _observe(self, metrics: Metrics) -> None:
        networks, gate = self.networks, self.gate
        metrics.observe(metrics.pixels_decoding, lambda: self.pixels.used)
        metrics.observe(metrics.bytes_in_flight, lambda: gate.body_bytes.used)
        metrics.observe(metrics.ready, lambda: self.is_ready)
        metrics.observe(metrics.circuit_open, lambda: networks.is_failing)
        metrics.observe(metrics.admitted, lambda: gate.admitted)
        for priority, bulk in (("interactive", False), ("bulk", True)):
            depth = metrics.queue_depth.labels(priority)
            metrics.observe(depth, partial(networks.waiting, bulk=bulk))
            expected = metrics.expected_wait_seconds.labels(priority)
            metrics.observe(expected, partial(gate.wait_s, bulk=bulk))
        metrics.observe(metrics.queue_age_seconds, networks.longest_wait_s)

    @property
    def is_ready(self) -> bool:
        """Warmed up, working, and not on the way out."""
        return self.networks.works and not self.draining

    @property
    def backend(self) -> BackendInfo:
        """What runs the network.

        Raises:
            Unavailable: nothing does yet.
        """
        return self.networks.current.info

    def check_ready(self) -> None:
        """Raises:
        Unavailable: requests are not served, or are better sent elsewhere.
        """
        self.networks.check_works()
        if self.draining:
            raise Unavailable(_GOING_DOWN)

    async def use(self, backend: Backend, on_failing: Callable[[], None] = lambda: None) -> None:
        """Prove `backend` and let it serve from now on, in place of the one before.

        Args:
            backend: loaded.
            on_failing: called if it fails many times in a row, or hangs.

        Raises:
            BackendError: it does not work; the one before goes on.
        """
        seconds_an_image = await proved(backend, self.threads.interactive)
        batcher = Batcher(
            backend,
            self.metrics,
            max_batch=self.settings.max_batch,
            max_wait_ms=self.settings.max_wait_ms,
            on_failing=on_failing,
        )
        info = batcher.info
        self.gate.expect(seconds_an_image, batcher.max_batch)
        self.metrics.serves(info)
        log.info("ready: %s %s on %s, %s", info.name, info.version, info.device, info.precision)
        await self.networks.swap(batcher)

    async def close(self) -> None:
        """Finish what was accepted, then give threads and backend back."""
        await self.networks.close()
        self.threads.close()

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

    @contextlib.contextmanager
    def admission(self, *, deadline: float, bulk: bool = False) -> Iterator[Place]:
        """A place among the requests being worked on; see `Gate.enter`.

        Raises:
            Unavailable: no backend is ready.
            Overloaded: there is no room, or not in time.
        """
        self.networks.check_works()
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
                photo = await self.threads.run(self._decode, read, is_gone, bulk=bulk)
            if is_gone():
                raise ClientGone
        except ClientGone:
            self.metrics.dropped.labels("client_gone").inc()
            raise
        stages.end("decode")
        (inference,), backend = await self.networks.infer(
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


_GOING_DOWN = "The server is going down: send requests to another one."
