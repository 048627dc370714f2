"""The limits, threads and networks that all requests share."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from server.backends import Backend, BackendError, BackendInfo
from server.backends.model_file import read_detector, read_quality
from server.inference.admission import Gate
from server.inference.batching import Batcher
from server.inference.budgets import PixelBudget
from server.inference.errors import GoingDown
from server.inference.networks import Network, Networks
from server.inference.proving import proved
from server.inference.threads import Threads
from server.inference.turns import Turns
from server.observe.metrics import Metrics
from server.settings import Settings

__all__ = ["Service"]

Result = TypeVar("Result")

log = logging.getLogger("slsnet.service")


class Service:
    """Owns the limits, the threads and the networks in use."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self._draining = False
        self._giving_up = asyncio.Event()
        self.gate = Gate(settings)
        self.pixels = PixelBudget(settings.max_pixels_decoding)
        """Pixels of photos being decoded, and of probabilities being enlarged to a photo's size."""
        self.threads = Threads(settings.decoders)
        self.networks = Networks()
        self.turns = {bulk: Turns(1) for bulk in (False, True)}
        """Turns of interactive and of bulk photos. Their number suits the network in use."""
        self.bulk_photos = asyncio.Semaphore(settings.max_queue)
        """Photos that are at work for all requests with several photos together."""
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
            metrics.observe(depth, partial(self._waiting, bulk))
            expected = metrics.expected_wait_seconds.labels(priority)
            metrics.observe(expected, partial(gate.wait_s, bulk=bulk))
        metrics.observe(metrics.queue_age_seconds, self._longest_wait_s)

    def _waiting(self, bulk: bool) -> int:
        return self.turns[bulk].waiting() + self.networks.waiting(bulk=bulk)

    def _longest_wait_s(self) -> float:
        waits = [turns.longest_wait_s() for turns in self.turns.values()]
        return max(self.networks.longest_wait_s(), *waits)

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop, and wants no more requests."""
        return self._draining

    def begin_drain(self) -> None:
        """Want no more requests; those that come nevertheless are served."""
        self._draining = True

    def give_up(self) -> None:
        """Let requests with several photos wait no longer: the drain's time is nearly up."""
        self._giving_up.set()

    @property
    def is_ready(self) -> bool:
        """Whether the network is warm and works, and the server does not drain."""
        return self.networks.works and not self.draining

    @property
    def backend(self) -> BackendInfo:
        """The backend in use.

        Raises:
            Unavailable: none is loaded yet.
        """
        return self.networks.current.info

    def check_ready(self) -> None:
        """Check that requests are welcome.

        Raises:
            Unavailable: the server loads or drains, or the network fails.
        """
        self.networks.check_works()
        if self.draining:
            raise GoingDown(_GOING_DOWN)

    async def use(self, backend: Backend, on_failing: Callable[[], None] = lambda: None) -> None:
        """Prove `backend` and let it serve from now on.

        Args:
            backend: loaded.
            on_failing: called if it fails many times in a row, or hangs.

        Raises:
            BackendError: it does not work, or the table of quality or the detector is not its own;
                the previous one goes on.
        """
        seconds_an_image = await proved(backend, self.threads.interactive)
        try:
            network = self.settings.model, backend.describe()
            quality = await self.threads.run(read_quality, *network)
            detector = await self.threads.run(read_detector, *network)
        except BackendError:
            backend.close()
            raise
        batcher = Batcher(
            backend,
            self.metrics,
            max_batch=self.settings.max_batch,
            max_wait_ms=self.settings.max_wait_ms,
            on_failing=on_failing,
            quality=quality,
            detector=detector,
        )
        info = batcher.info
        self.metrics.serves(info)
        log.info("ready: %s %s on %s, %s", info.name, info.version, info.device, info.precision)
        await self.take(batcher, seconds_an_image)

    async def take(self, network: Network, seconds_an_image: float, sharers: int = 1) -> None:
        """Let `network`, which is proved, serve from now on.

        Args:
            network: the previous one answers what it accepted.
            seconds_an_image: what it takes for a photo, while as many run as can.
            sharers: number of processes that share it; each keeps its part of it busy.
        """
        self.gate.expect(seconds_an_image, network.max_batch)
        # While as many run as can, as many are ready to follow, and each thread decodes one.
        ahead = math.ceil(2 * network.info.slots * network.max_batch / sharers)
        limit = ahead + self.settings.decoders
        self.turns = {bulk: Turns(limit) for bulk in (False, True)}
        await self.networks.swap(network)

    async def close(self) -> None:
        """Finish what was accepted, then end the threads and close the backend."""
        await self.networks.close()
        self.threads.close()

    async def unless_given_up(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, if the drain's time suffices; see `give_up`.

        Raises:
            GoingDown: it does not.
        """
        doing = asyncio.ensure_future(work)
        giving_up = asyncio.ensure_future(self._giving_up.wait())
        try:
            await asyncio.wait((doing, giving_up), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise GoingDown(_GOING_DOWN)
            return await doing
        finally:
            doing.cancel()
            giving_up.cancel()
            # Its exception's traceback has this frame: the two would keep each other, and a photo.
            del doing


_GOING_DOWN = "The server is going down: send requests to another one."
