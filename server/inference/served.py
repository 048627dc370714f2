"""A network by its name: what runs it now, and what ran it before for requests in flight."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.backends import BackendInfo
from server.inference.batching import FAILING, Inference
from server.inference.errors import Unavailable
from server.inference.turns import Turns
from server.observe.metrics import Metrics

__all__ = ["Network", "Served"]


class Network(Protocol):
    """Runs photos: a `Batcher`, or the way to one in another process (`server.inference.sharing`).

    All methods are called on one event loop, and are described at `Batcher`.
    """

    info: BackendInfo
    max_batch: int

    @property
    def is_failing(self) -> bool: ...

    def submit(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        deadline: float,
        is_gone: Callable[[], bool],
        bulk: bool,
    ) -> asyncio.Future[list[Inference]]: ...

    def waiting(self, *, bulk: bool) -> int: ...

    def longest_wait_s(self) -> float: ...

    def idle_s(self) -> float: ...

    async def close(self) -> None: ...


class Served:
    """A network by its name. It is swapped while requests are served: each is answered by one.

    Args:
        name: what requests call it.
        file: the ONNX file that it is loaded from.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file
        self.turns = {bulk: Turns(1) for bulk in (False, True)}
        """Turns of interactive and of bulk photos. Their number suits the network in use."""
        self._current: Network | None = None
        self._serving: dict[str, Network] = {}
        """The last one loaded of each network that serves, by its `_name`."""
        self._pins: Counter[str] = Counter()
        self._retiring: set[asyncio.Task[None]] = set()
        self._users = 0
        self._unused = asyncio.Event()

    def observe(self, metrics: Metrics) -> None:
        """Let `metrics` show it, until they forget its name."""
        metrics.observe(metrics.network_ready.labels(self.name), lambda: self.works)
        for priority, bulk in (("interactive", False), ("bulk", True)):
            depth = metrics.network_queue_depth.labels(self.name, priority)
            metrics.observe(depth, partial(self.waiting, bulk=bulk))

    @property
    def is_failing(self) -> bool:
        """Whether the backend failed too often in a row, or hangs, and gets no more work."""
        return self._current is not None and self._current.is_failing

    @property
    def works(self) -> bool:
        """Whether a network is loaded and does not keep failing."""
        return self._current is not None and not self._current.is_failing

    def check_works(self) -> None:
        """Check that photos can run.

        Raises:
            Unavailable: no backend is ready, or it keeps failing.
        """
        if self.current.is_failing:
            raise Unavailable(FAILING)

    @property
    def current(self) -> Network:
        """The one that runs new photos.

        Raises:
            Unavailable: nothing has been loaded yet.
        """
        if self._current is None:
            raise Unavailable(
                f"The network {self.name} is still being loaded.", f"/v2/models/{self.name}/ready"
            )
        return self._current

    @property
    def info(self) -> BackendInfo | None:
        """What runs new photos; None if nothing has been loaded yet."""
        return self._current.info if self._current else None

    def waiting(self, *, bulk: bool) -> int:
        """Photos that wait for it, or to be decoded for it."""
        return self.turns[bulk].waiting() + self.queued(bulk=bulk)

    def queued(self, *, bulk: bool) -> int:
        """Photos in the queue."""
        return self._current.waiting(bulk=bulk) if self._current else 0

    def longest_wait_s(self) -> float:
        """The longest time that a photo which waits has waited up to now."""
        waits = (turns.longest_wait_s() for turns in self.turns.values())
        return max(self._current.longest_wait_s() if self._current else 0.0, *waits)

    def idle_s(self) -> float:
        """Seconds since the network in use last ran a photo, or came into use."""
        return self._current.idle_s() if self._current else 0.0

    async def swap(self, network: Network) -> None:
        """Let `network` serve from now on.

        The previous one answers what it accepted, and is then closed. This does not wait for
        requests that have it `pinned`.
        """
        former, self._current = self._current, network
        retired = [self._serving.pop(_name(network), None)]
        self._serving[_name(network)] = network
        if former is not None and former not in retired and not self._pins[_name(former)]:
            retired.append(self._serving.pop(_name(former)))
        for one in retired:
            if one is not None:
                await one.close()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """A request needs it during the block, even if it is retired meanwhile."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    @contextlib.contextmanager
    def pinned(self) -> Iterator[str]:
        """Keep what runs it now available, even if another takes over meanwhile; see `infer`."""
        network = _name(self.current)
        self._pins[network] += 1
        try:
            with self.kept():
                yield network
        finally:
            self._pins[network] -= 1
            if not self._pins[network] and self._serving[network] is not self._current:
                retiring = asyncio.create_task(self._serving.pop(network).close())
                self._retiring.add(retiring)
                retiring.add_done_callback(self._retiring.discard)

    def pin(self, name: str) -> Network:
        """What runs it for those to whom `pinned` gave this name."""
        return self._serving[name]

    async def infer(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        deadline: float,
        is_gone: Callable[[], bool],
        bulk: bool,
        pin: str | None = None,
    ) -> tuple[list[Inference], BackendInfo]:
        """Run the pixels of one request's photos, and say which backend ran all of them.

        Args:
            images: each uint8 [128, 128, 3].
            deadline, is_gone, bulk: as for `Batcher.submit`.
            pin: what `pinned` gave; None for what runs it now.

        Raises:
            DeadlineExceeded, ClientGone, InferenceFailed, Unavailable: of the first photo that
                failed.
        """
        # Looked up only now, since another backend may have taken over while a photo was decoded.
        runs = self.pin(pin) if pin is not None else self.current
        result = runs.submit(images, deadline=deadline, is_gone=is_gone, bulk=bulk)
        try:
            return await result, runs.info
        finally:
            # Not kept: an exception's traceback has this frame, and would keep itself.
            del result

    async def retire(self) -> None:
        """Wait for the requests that need it, then close it."""
        while self._users:
            self._unused.clear()
            await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Finish what was accepted."""
        await asyncio.gather(*self._retiring, *(one.close() for one in self._serving.values()))


def _name(network: Network) -> str:
    """A name for the network: the digest of its file, or else a name for this load alone.

    Metadata would not do: a file may claim anything.
    """
    return network.info.file_sha256 or f"load {id(network)}"
