"""The owner's side: the service whose network the feeders use."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from server.backends import Backend, BackendError
from server.inference.batching import Inference
from server.inference.errors import ClientGone, DeadlineExceeded, Unavailable
from server.inference.served import Network, Served
from server.inference.service import Service
from server.inference.sharing.memory import Slots
from server.inference.sharing.messages import (
    ANSWER,
    BEAT_S,
    DROP,
    OUTCOMES,
    PHOTO,
    RELEASE,
    Channel,
    Record,
)
from server.observe.metrics import Metrics
from server.settings import Settings

__all__ = ["SharedService"]

log = logging.getLogger("slsnet.sharing")


class SharedService(Service):
    """A service without requests of its own: its networks run the photos of feeders."""

    def __init__(self, settings: Settings, metrics: Metrics, slots: Sequence[Slots]) -> None:
        """Begin with no network loaded.

        Args:
            settings: of the server; `workers` is the number of owners that share the cores.
            metrics: of this process.
            slots: of each feeder, by its number.
        """
        super().__init__(settings, metrics)
        self.slots = slots
        self.reload: Callable[[], Any]
        """Loads the networks from their files again; set before the first feeder comes."""
        self._feeders: dict[int, _Feeder] = {}
        self._cards: dict[str, dict[str, Any]] = {}
        """What feeders are told of each network, by its name."""
        self._networks_taken = 0
        self._deserted = asyncio.Event()

    def listen(self) -> "_Feeder":
        """Make a feeder's connection; given to the event loop."""
        return _Feeder(self)

    async def use(
        self,
        backend: Backend,
        on_failing: Callable[[], None] = lambda: None,
        served: Served | None = None,
    ) -> None:
        served = served or self.networks.default

        def failing() -> None:
            if served.is_failing:
                for feeder in self._feeders.values():
                    feeder.say({"failing": served.name})
            on_failing()

        await super().use(backend, failing, served)

    async def take(
        self, served: Served, network: Network, seconds_an_image: float, sharers: int = 1
    ) -> None:
        self._networks_taken += 1
        # Set before, for a feeder that comes while what ran it before finishes.
        self._cards[served.name] = {
            "name": served.name,
            "number": self._networks_taken,
            "info": asdict(network.info),
            "max_batch": network.max_batch,
            "seconds_an_image": seconds_an_image,
            "sharers": len(self.slots),
            "owner": os.getpid(),
        }
        await super().take(served, network, seconds_an_image, sharers)
        for feeder in self._feeders.values():
            self._tell(feeder, self._cards[served.name])

    def retire(
        self, name: str, reason: str = "", first: Coroutine[Any, Any, None] | None = None
    ) -> None:
        super().retire(name, reason, first)
        self._cards.pop(name, None)
        for feeder in self._feeders.values():
            feeder.say({"retired": name, "reason": reason})

    def _tell(self, feeder: "_Feeder", card: dict[str, Any]) -> None:
        if card["number"] not in feeder.pins:
            feeder.take(card)

    def join(self, number: int, feeder: "_Feeder") -> None:
        """A feeder is there; one that had the number before is gone."""
        if former := self._feeders.get(number):
            former.end()
        self._feeders[number] = feeder
        self._deserted.clear()
        for served in self.networks:
            if served.info is not None:
                self._tell(feeder, self._cards[served.name])
            if served.is_failing:
                # It is loaded all the same: the feeder need not wait for it.
                feeder.say({"failing": served.name})
        for name, reason in self.networks.refusals.items():
            feeder.say({"retired": name, "reason": reason})

    def leave(self, number: int, feeder: "_Feeder") -> None:
        """A feeder is gone."""
        if self._feeders.get(number) is feeder:
            del self._feeders[number]
            if not self._feeders:
                self._deserted.set()

    async def deserted(self) -> None:
        """Wait until no feeder is there."""
        while self._feeders:
            await self._deserted.wait()

    async def beat(self) -> None:
        """Let feeders know all the time that this process lives."""
        while True:
            await asyncio.sleep(BEAT_S)
            for feeder in self._feeders.values():
                feeder.beat()


class _Photo:
    """A feeder's photo, from its slot to the answer there."""

    __slots__ = ("feeder", "is_left", "result", "slot")

    def __init__(self, feeder: "_Feeder", slot: int) -> None:
        self.feeder = feeder
        self.slot = slot
        self.is_left = False
        """The client hung up."""
        self.result: asyncio.Future[list[Inference]]

    def is_gone(self) -> bool:
        return self.is_left

    def drop(self, *, is_left: bool) -> None:
        """Nobody waits for it any more."""
        self.is_left = is_left
        self.result.cancel()

    def done(self, result: asyncio.Future[list[Inference]]) -> None:
        """Answer the feeder."""
        error = None if result.cancelled() else result.exception()
        if self.feeder.is_over:
            return
        if result.cancelled() or error is not None:
            self.feeder.answer(self.slot, OUTCOMES.index(_outcome(error)))
            return
        (inference,) = result.result()
        self.feeder.slots.probability[self.slot] = inference.probability
        times = inference.started, inference.ended
        self.feeder.answer(self.slot, 0, inference.batch_size, times)


def _outcome(error: BaseException | None) -> str:
    if error is None or isinstance(error, ClientGone):
        return "dropped"
    if isinstance(error, DeadlineExceeded):
        return "late"
    return "unavailable" if isinstance(error, Unavailable) else "failed"


class _Feeder(Channel):
    """A feeder, as long as it is connected."""

    def __init__(self, service: SharedService) -> None:
        super().__init__()
        self._service = service
        self._number = -1
        self.slots: Slots
        self.pins: dict[int, tuple[Served, str, contextlib.ExitStack]] = {}
        """The networks that it may use and their pins, by their number here."""
        self.is_over = False
        """Its slots are another's, or nobody's."""
        self._photos: dict[int, _Photo] = {}
        self._reloading: set[asyncio.Task[None]] = set()

    def on_message(self, message: dict[str, Any]) -> None:
        if "feeder" in message:
            number = message["feeder"]
            if number not in range(len(self._service.slots)):
                raise ValueError(f"there is no feeder {number}")
            self.slots = self._service.slots[number]
            self._number = number
            self._service.join(number, self)
        else:
            task = self._loop.create_task(self._reload(message["reload"]))
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)

    def on_records(self, records: Iterable[Record]) -> None:
        for kind, flag, slot, number, deadline, _ in records:
            if kind == PHOTO:
                self._run(slot, number, deadline, bulk=bool(flag))
            elif kind == DROP:
                if photo := self._photos.get(slot):
                    photo.drop(is_left=bool(flag))
            elif kind == RELEASE:
                self.pins.pop(number)[-1].close()

    def _run(self, slot: int, number: int, deadline: float, *, bulk: bool) -> None:
        if slot in self._photos:
            raise ValueError(f"slot {slot} is in use")
        photo = _Photo(self, slot)
        served, pin, _ = self.pins[number]
        photo.result = served.pin(pin).submit(
            [self.slots.pixels[slot]], deadline=deadline, is_gone=photo.is_gone, bulk=bulk
        )
        self._photos[slot] = photo
        photo.result.add_done_callback(photo.done)

    def answer(
        self, slot: int, outcome: int, photos: int = 0, times: tuple[float, float] = (0, 0)
    ) -> None:
        """The photo in `slot` is over, which frees the slot."""
        del self._photos[slot]
        self.put(ANSWER, outcome, slot, photos, *times)

    def take(self, card: dict[str, Any]) -> None:
        """Tell of a network that serves, and keep it until the feeder does not need it."""
        served, held = self._service.networks.named(card["name"]), contextlib.ExitStack()
        self.pins[card["number"]] = served, held.enter_context(served.pinned()), held
        self.say({"network": card})

    async def _reload(self, number: int) -> None:
        error = None
        try:
            await self._service.reload()
        except (BackendError, OSError) as problem:
            error = str(problem)
        except Exception:
            log.exception("the network cannot be loaded again")
            error = "see the server's log"
        self.say({"reloaded": number, "error": error})

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.end()

    def end(self) -> None:
        """Drop its photos and what it keeps: the feeder is gone, or there is a new one."""
        if self.is_over:
            return
        self.is_over = True
        self.cut()
        for photo in self._photos.values():
            photo.drop(is_left=True)
        for *_, held in self.pins.values():
            held.close()
        self.pins.clear()
        self._service.leave(self._number, self)
