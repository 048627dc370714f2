"""The limits, threads and networks that all requests share."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from photos.image import JpegReader
from server.backends import Backend, BackendInfo
from server.inference.admission import Gate
from server.inference.batching import Batcher
from server.inference.budgets import PixelBudget
from server.inference.drain import Drain
from server.inference.errors import Unavailable
from server.inference.networks import Networks
from server.inference.proving import proved
from server.inference.served import Network, Served
from server.inference.threads import Threads
from server.inference.turns import Turns
from server.observe.metrics import Metrics
from server.settings import Settings

__all__ = ["Service"]

log = logging.getLogger("slsnet.service")


class Service:
    """Owns the limits and the threads, which all networks share, and the networks in use."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.drain = Drain()
        self.gate = Gate(settings)
        self.pixels = PixelBudget(settings.max_pixels_decoding)
        """Pixels of photos being decoded, and of probabilities being enlarged to a photo's size."""
        self.jpeg: JpegReader | None = None
        """Decodes usual JPEG files in the CPU's place."""
        self.threads = Threads(settings.decoders)
        self.networks = Networks(settings.networks)
        self.bulk_photos = asyncio.Semaphore(settings.max_queue)
        """Photos that are at work for all requests with several photos together."""
        _observe(self)

    @property
    def is_ready(self) -> bool:
        """Whether the default network is warm and works, and the server does not drain."""
        return self.networks.default.works and not self.drain.begun

    @property
    def is_server_ready(self) -> bool:
        """Whether the server is ready; see `check_server_ready`."""
        return self.is_ready and not self.networks.are_loading

    @property
    def backend(self) -> BackendInfo:
        """The backend in use, of the default network.

        Raises:
            Unavailable: none is loaded yet.
        """
        return self.networks.default.current.info

    def check_ready(self, network: str | None = None) -> None:
        """Check that requests are welcome, which name this network.

        Raises:
            UnknownNetwork: there is no such network.
            Unavailable: it is being loaded or fails, or the server drains.
        """
        self.networks.named(network).check_works()
        self.drain.check()

    def check_server_ready(self) -> None:
        """Check that the server is ready: one that it replaces may go.

        The default network works, and all others have been loaded, or refused.

        Raises:
            Unavailable: that is not so, or the server drains.
        """
        self.check_ready()
        if self.networks.are_loading:
            raise Unavailable("Further networks are still being loaded.")

    async def use(
        self,
        backend: Backend,
        on_failing: Callable[[], None] = lambda: None,
        served: Served | None = None,
    ) -> None:
        """Prove `backend` and let it serve from now on.

        Args:
            backend: loaded.
            on_failing: called if it fails many times in a row, or hangs.
            served: the network that it runs; None for the default one.

        Raises:
            BackendError: it does not work, or the table of quality or the detector is not its own;
                the previous one goes on.
        """
        served = served or self.networks.default
        found = await proved(backend, served.file, self.threads.interactive)
        batcher = Batcher(
            backend,
            self.metrics,
            max_batch=self.settings.max_batch,
            max_wait_ms=self.settings.max_wait_ms,
            on_failing=on_failing,
            quality=found.quality,
            detector=found.detector,
            name=served.name,
        )
        info = batcher.info
        self.metrics.serves(served.name, info)
        runs = (served.name, info.name, info.version, info.device, info.precision)
        log.info("ready: %s by %s %s on %s, %s", *runs)
        await self.take(served, batcher, found.seconds_an_image)

    async def take(
        self, served: Served, network: Network, seconds_an_image: float, sharers: int = 1
    ) -> None:
        """Let `network`, which is proved, run `served` from now on.

        Args:
            served: what ran it before answers what it accepted.
            network: runs it.
            seconds_an_image: what it takes for a photo, while as many run as can.
            sharers: number of processes that share it; each keeps its part of it busy.
        """
        if served is self.networks.default:
            # Until photos were measured; then all networks have one pace, as they share the cores.
            self.gate.expect(seconds_an_image, network.max_batch)
        # While as many run as can, as many are ready to follow, and each thread decodes one.
        ahead = math.ceil(2 * network.info.slots * network.max_batch / sharers)
        limit = ahead + self.settings.decoders
        served.turns = {bulk: Turns(limit) for bulk in (False, True)}
        await served.swap(network)

    def add(self, served: Served) -> None:
        """Let requests name `served`, which is loaded, from now on."""
        self.networks.add(served)
        served.observe(self.metrics)

    def retire(
        self, name: str, reason: str = "", first: Coroutine[Any, Any, None] | None = None
    ) -> None:
        """Let no request name this network any more; those that came before are still answered.

        Args:
            name: of a network that serves.
            reason: why it cannot serve, if that is so.
            first: as for `Networks.retire`.
        """
        if reason:
            self.networks.refusals[name] = reason
        self.networks.retire(name, first)
        self.metrics.forget(name)

    async def close(self) -> None:
        """Finish what was accepted, then end the threads and close the backend."""
        await self.networks.close()
        self.threads.close()


def _observe(service: Service) -> None:
    metrics, networks, gate = service.metrics, service.networks, service.gate
    metrics.observe(metrics.pixels_decoding, lambda: service.pixels.used)
    metrics.observe(metrics.bytes_in_flight, lambda: gate.body_bytes.used)
    metrics.observe(metrics.ready, lambda: service.is_server_ready)
    metrics.observe(metrics.circuit_open, lambda: any(one.is_failing for one in networks))
    metrics.observe(metrics.admitted, lambda: gate.admitted)
    for priority, bulk in (("interactive", False), ("bulk", True)):
        depth = metrics.queue_depth.labels(priority)
        metrics.observe(depth, partial(networks.waiting, bulk=bulk))
        expected = metrics.expected_wait_seconds.labels(priority)
        metrics.observe(expected, partial(gate.wait_s, bulk=bulk))
    metrics.observe(metrics.queue_age_seconds, networks.longest_wait_s)
    for served in networks:
        served.observe(metrics)
