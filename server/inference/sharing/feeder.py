"""A feeder's side: photos go to the owner of the network, and what the owner says comes back."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from photos.fitness import Detector
from photos.quality import QualityTable
from server.backends import BackendError, BackendInfo
from server.inference.batching import (
    FAILED_TWICE,
    FAILING,
    TOO_LATE,
    Inference,
    Item,
    Request,
    is_wanted,
    items_of,
)
from server.inference.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    Unavailable,
    Unprocessable,
)
from server.inference.repository import NOT_ALONE
from server.inference.served import Served
from server.inference.service import Service
from server.inference.sharing.memory import BULK_SLOTS, INTERACTIVE_SLOTS, Slots
from server.inference.sharing.messages import DROP, OUTCOMES, PHOTO, RELEASE, Channel, Record

__all__ = ["Address", "Link"]

log = logging.getLogger("slsnet.sharing")

# Seconds between two looks for clients that left, and for signs of the owner's life.
_LOOK_S = 0.25

# Seconds without a sign of life after which the owner is given up. A sign comes every second.
_SILENT_S = 30.0

# Seconds between two attempts to reach an owner.
_PAUSE_S = 0.2

_ERRORS: dict[str, Callable[[], Exception]] = {
    "dropped": ClientGone,
    "late": lambda: DeadlineExceeded(TOO_LATE),
    "failed": lambda: InferenceFailed(FAILED_TWICE),
    "unavailable": lambda: Unavailable(FAILING),
}


@dataclass(frozen=True)
class Address:
    """Where a feeder finds the owner of its network."""

    path: str
    """Path of the owner's Unix socket."""
    memory: int
    """File descriptor of the feeder's memory (`new_memory`)."""
    feeder: int
    """Number of the feeder among those of this owner."""

    def __str__(self) -> str:
        return f"{self.memory},{self.feeder},{self.path}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address that `str` wrote."""
        memory, feeder, path = text.split(",", 2)
        return cls(path, int(memory), int(feeder))


class _SharedNetwork:
    """A network that the owner runs; see `Network`."""

    def __init__(self, owner: "_OwnerLink", number: int, info: BackendInfo, max_batch: int) -> None:
        self.info = info
        self.max_batch = max_batch
        self.number = number
        self.fails = False
        """The owner said so."""
        self.unsent = 0
        """Photos that wait in this process for a slot."""
        self._owner = owner
        self._is_closed = False

    @property
    def is_failing(self) -> bool:
        return self.fails or self._owner.is_lost

    def submit(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        deadline: float,
        is_gone: Callable[[], bool],
        bulk: bool,
    ) -> asyncio.Future[list[Inference]]:
        request, items = items_of(images, deadline, is_gone)
        self.unsent += len(items)
        self._owner.submit(self, items, bulk=bulk)
        return request.result

    def waiting(self, *, bulk: bool) -> int:
        # The owner counts those that it has.
        return len(self._owner.waiting(self, bulk=bulk))

    def longest_wait_s(self) -> float:
        waiting = (self._owner.waiting(self, bulk=bulk) for bulk in (False, True))
        arrived = [items[0].request.arrived for items in waiting if items]
        return time.perf_counter() - min(arrived) if arrived else 0.0

    def idle_s(self) -> float:
        # Only the owner builds engines in a lull.
        return 0.0

    async def close(self) -> None:
        self._is_closed = True
        self.release()

    def release(self) -> None:
        """Tell the owner that the network is not needed here, once that is so."""
        if self._is_closed and not self.unsent:
            self._owner.put(RELEASE, number=self.number)


class _OwnerLink(Channel):
    """The owner of the network, as long as it is connected."""

    def __init__(
        self,
        slots: Slots,
        service: Service,
        on_network: Callable[["_OwnerLink", dict[str, Any]], None],
    ) -> None:
        super().__init__()
        self.lost = asyncio.Event()
        self._slots = slots
        self._service = service
        self._metrics = service.metrics
        self._on_network = on_network
        # The one used last comes first: its memory is in the processor's caches.
        self._free = {
            False: list(range(INTERACTIVE_SLOTS)),
            True: list(range(INTERACTIVE_SLOTS, INTERACTIVE_SLOTS + BULK_SLOTS)),
        }
        self._waiting: dict[bool, deque[tuple[_SharedNetwork, Item]]]
        self._waiting = {False: deque(), True: deque()}
        self._sent: dict[int, tuple[Request, int]] = {}
        """Requests of the photos at the owner and their places in them, by slot."""
        self._dropped: set[int] = set()
        self._newest: dict[str, _SharedNetwork] = {}
        """What runs each network, by its name."""
        self._owner_pid: int | None = None
        self._silent_s = 0.0
        self._reloads: dict[int, asyncio.Future[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Not before: uvloop makes a link for each attempt, and those that fail would look for ever.
        self._look_again()

    def network(self, card: dict[str, Any]) -> _SharedNetwork:
        """The network that the owner has told of."""
        fields = {**card["info"], "buckets": tuple(card["info"]["buckets"])}
        if fields["quality"] is not None:
            fields["quality"] = QualityTable.of(fields["quality"])
        if fields["detector"] is not None:
            fields["detector"] = Detector.of(fields["detector"])
        self._owner_pid = card["owner"]
        info = BackendInfo(**fields)
        network = _SharedNetwork(self, card["number"], info, card["max_batch"])
        self._newest[card["name"]] = network
        return network

    def submit(self, network: _SharedNetwork, items: Sequence[Item], *, bulk: bool) -> None:
        """Send photos to the owner, as slots become free."""
        self._waiting[bulk].extend((network, item) for item in items)
        if network.is_failing:
            self._refuse_waiting()
        else:
            self._fill(bulk)

    def waiting(self, network: _SharedNetwork, *, bulk: bool) -> list[Item]:
        """A network's photos that wait for a slot, in their order."""
        return [item for waits_for, item in self._waiting[bulk] if waits_for is network]

    def _fill(self, bulk: bool) -> None:
        waiting, free = self._waiting[bulk], self._free[bulk]
        while waiting and free:
            network, item = waiting.popleft()
            if is_wanted(item, self._metrics):
                slot = free.pop()
                self._slots.pixels[slot] = item.pixels
                self._sent[slot] = item.request, item.place
                self.put(PHOTO, bulk, slot, network.number, item.request.deadline)
            network.unsent -= 1
            network.release()

    def on_records(self, records: Iterable[Record]) -> None:
        for _, outcome, slot, batch_size, started, ended in records:
            request, place = self._sent.pop(slot)
            if outcome:
                request.fail(_ERRORS[OUTCOMES[outcome]]())
            elif not request.result.done():
                probability = self._slots.probability[slot].copy()
                request.answer(place, Inference(probability, started, ended, batch_size))
            self._dropped.discard(slot)
            self._free[slot >= INTERACTIVE_SLOTS].append(slot)
        for bulk in self._waiting:
            self._fill(bulk)

    def on_message(self, message: dict[str, Any]) -> None:
        if "network" in message:
            self._on_network(self, message["network"])
        elif "failing" in message:
            if network := self._newest.get(message["failing"]):
                network.fails = True
            self._refuse_waiting()
        elif "retired" in message:
            if message["retired"] in self._service.networks:
                self._service.retire(message["retired"], message["reason"])
        else:
            reload = self._reloads.pop(message["reloaded"])
            if reload.done():
                return
            if message["error"] is None:
                reload.set_result(None)
            else:
                reload.set_exception(BackendError(message["error"]))

    def data_received(self, data: bytes) -> None:
        self._silent_s = 0.0
        super().data_received(data)

    async def reload(self) -> None:
        """Let the owner load the networks from their files again.

        Raises:
            BackendError: one does not work; the previous one goes on.
            Unavailable: the owner is gone.
        """
        if self.is_lost:
            raise Unavailable(FAILING)
        number = max(self._reloads, default=0) + 1
        self._reloads[number] = self._loop.create_future()
        self.say({"reload": number})
        await self._reloads[number]

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._look.cancel()
        for request, _ in self._sent.values():
            request.fail(Unavailable(FAILING))
        self._sent.clear()
        self._refuse_waiting()
        for reload in self._reloads.values():
            if not reload.done():
                reload.set_exception(Unavailable(FAILING))
        self.lost.set()

    def _refuse_waiting(self) -> None:
        """Refuse the photos that wait for a network which fails."""
        for queue in self._waiting.values():
            for _ in range(len(queue)):
                network, item = queue.popleft()
                if not network.is_failing:
                    queue.append((network, item))
                    continue
                item.request.fail(Unavailable(FAILING))
                network.unsent -= 1
                network.release()

    def _look_again(self) -> None:
        """Tell the owner which photos nobody waits for, and give up an owner that is silent."""
        self._look = self._loop.call_later(_LOOK_S, self._look_again)
        for slot, (request, _) in self._sent.items():
            if slot in self._dropped:
                continue
            is_gone = request.is_gone()
            if is_gone or request.result.done():
                self._dropped.add(slot)
                self.put(DROP, is_gone, slot)
        # Looks are counted, and not time: this process may have been stopped for a while.
        self._silent_s += _LOOK_S
        if self._owner_pid is not None and self._silent_s > _SILENT_S:
            log.error(
                "the network's process %d gives no sign of life for %g s, it is killed",
                self._owner_pid,
                _SILENT_S,
            )
            # The supervisor, whose child it is, starts another.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._owner_pid, signal.SIGKILL)
            self.cut()


class Link:
    """Keeps a feeder connected to the owner, and lets the owner's networks serve.

    It takes the place of a `Repository`.
    """

    def __init__(self, service: Service, address: Address) -> None:
        self._service = service
        self._address = address
        self._slots = Slots(address.memory)
        self._owner: _OwnerLink | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._taking: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to connect. The network serves once the owner has told of it."""
        self._keeping = asyncio.create_task(self._keep())

    async def reload(self) -> BackendInfo:
        """Let the owner load all networks from their files again; see `Repository.reload`.

        Raises:
            BackendError: one does not work; the previous one goes on.
            Unavailable: the owner is gone.
        """
        if self._owner is None:
            raise Unavailable(FAILING)
        await self._owner.reload()
        return self._service.backend

    async def load(self, _name: str) -> None:
        """Refuse: other processes have the networks too.

        Raises:
            Unprocessable: always.
        """
        raise Unprocessable(NOT_ALONE)

    retire = load

    async def close(self) -> None:
        """End the connection: the owner has nothing more to do for this process."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._owner is not None:
            self._owner.cut()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                # It waits at the socket for an owner that is not there yet.
                _, owner = await loop.create_unix_connection(
                    lambda: _OwnerLink(self._slots, self._service, self._take), self._address.path
                )
            except OSError as error:
                log.debug("no way to the network's process: %s", error)
            else:
                self._owner = owner
                owner.say({"feeder": self._address.feeder})
                await owner.lost.wait()
                log.error("the network's process is gone: requests are refused until it is back")
            await asyncio.sleep(_PAUSE_S)

    def _take(self, owner: _OwnerLink, card: dict[str, Any]) -> None:
        service, network = self._service, owner.network(card)
        name = card["name"]
        if name not in service.networks:
            # The owner before could not load it.
            service.add(Served(name, service.settings.networks[name]))
        served = service.networks.named(name)
        task = asyncio.create_task(
            service.take(served, network, card["seconds_an_image"], card["sharers"])
        )
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)
