"""Feeders and the owner of their network, in one process: what each tells the other."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from server.backends import BackendError, BackendInfo
from server.inference.batching import FAILURES, Inference
from server.inference.errors import ClientGone, DeadlineExceeded, InferenceFailed, Unavailable
from server.inference.service import Service
from server.inference.sharing import feeder as feeding
from server.inference.sharing.feeder import Address, Link
from server.inference.sharing.memory import BULK_SLOTS, INTERACTIVE_SLOTS, Slots, new_memory
from server.inference.sharing.owner import SharedService
from server.observe.metrics import Metrics
from server.settings import Settings
from tests.support.backends import POISON, Held


class OpenBackend(Held):
    """It ends batches while it is open."""

    def __init__(self, name: str = "held", most: int = 4) -> None:
        self.open = threading.Event()
        self.open.set()
        info = BackendInfo(
            name,
            "1",
            "a GPU",
            "fp16",
            max_batch=most,
            buckets=(1, most),
            model={"version": name},
            file_sha256=name,
        )
        super().__init__(info, lambda: self.open.wait(60))


class Shared:
    """An owner and its feeders."""

    def __init__(self, owner: SharedService, folder: Path, count: int) -> None:
        self.owner = owner
        self.path = str(folder / "network")
        self.memories = [new_memory() for _ in range(count)]
        self.settings = owner.settings
        owner.slots = [Slots(memory) for memory in self.memories]
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(count)
        self.feeders: list[Service] = []
        self.links: list[Link] = []

    async def join(self, number: int) -> Service:
        service = Service(self.settings, Metrics())
        link = Link(service, Address(self.path, self.memories[number], number))
        await link.start()
        self.feeders.append(service)
        self.links.append(link)
        return service

    async def settle(self, expected: Callable[[], bool]) -> None:
        while not expected():  # noqa: ASYNC110  # another task or thread makes it so
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        for link, service in zip(self.links, self.feeders, strict=True):
            await link.close()
            await service.close()
        await self.owner.deserted()
        await self.owner.close()


@contextlib.asynccontextmanager
async def shared(
    folder: Path, backend: OpenBackend, count: int = 1, models: str = ""
) -> AsyncIterator[Shared]:
    """All of them, ready; of `models` none is loaded."""
    pair = Shared(SharedService(Settings(models=models), Metrics(), []), folder, count)
    server = await asyncio.get_running_loop().create_server(pair.owner.listen, sock=pair.listener)
    # On a slow machine feeders would take it for dead, and kill its process, which is the test's.
    beating = asyncio.create_task(pair.owner.beat())
    await pair.owner.use(backend)
    for number in range(count):
        service = await pair.join(number)
        await pair.settle(lambda: service.is_ready)  # noqa: B023  # it is over before the next
    backend.batches.clear()
    try:
        yield pair
    finally:
        backend.open.set()
        await pair.close()
        beating.cancel()
        server.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine with a limit, so that a lost photo fails instead of hanging."""
    asyncio.run(asyncio.wait_for(test(), 60))


def ask(
    service: Service,
    *values: int,
    seconds: float = 3600,
    is_gone: Callable[[], bool] = lambda: False,
    bulk: bool = False,
    pin: str | None = None,
    named: str | None = None,
) -> asyncio.Task[list[int]]:
    """The values in the answers to photos of these values."""

    async def values_of() -> list[int]:
        answers, _ = await service.networks.named(named).infer(
            [np.full((128, 128, 3), value, np.uint8) for value in values],
            deadline=time.perf_counter() + seconds,
            is_gone=is_gone,
            bulk=bulk,
            pin=pin,
        )
        return [_value(answer) for answer in answers]

    return asyncio.create_task(values_of())


def _value(answer: Inference) -> int:
    assert answer.started < answer.ended
    assert (answer.probability == answer.probability[0, 0]).all()
    return round(float(answer.probability[0, 0]) * 255)


def dropped(service: Service, reason: str) -> float:
    registry = service.metrics.registry
    return registry.get_sample_value("slsnet_dropped_total", {"reason": reason}) or 0


def test_photos_of_all_feeders_run_together_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend, 2) as pair:
            backend.open.clear()
            first = ask(pair.feeders[0], 1)
            await pair.settle(lambda: backend.batches == [[1]])
            others = [ask(pair.feeders[n % 2], n) for n in range(2, 6)]
            await pair.settle(lambda: pair.owner.networks.default.waiting(bulk=False) == 4)
            # The owner shows those that wait, and nobody else: the figures are added up.
            assert not any(feeder.networks.default.queued(bulk=False) for feeder in pair.feeders)
            backend.open.set()
            assert [await task for task in (first, *others)] == [[n] for n in range(1, 6)]
            assert sorted(backend.batches[1]) == [2, 3, 4, 5]
            assert len(backend.batches) == 2

    run(scenario)


def test_more_photos_than_slots_are_answered_in_their_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, OpenBackend()) as pair:
            values = [n % POISON for n in range(2 * INTERACTIVE_SLOTS + 1)]
            assert await ask(pair.feeders[0], *values) == values
            assert await ask(pair.feeders[0], *values, bulk=True) == values

    run(scenario)


@pytest.mark.parametrize("reason", ["client_gone", "abandoned"])
def test_photos_that_nobody_waits_for_free_their_slots(tmp_path: Path, reason: str) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend) as pair:
            (feeder,) = pair.feeders
            backend.open.clear()
            first = ask(feeder, 1)
            await pair.settle(lambda: bool(backend.batches))
            left = threading.Event()
            others = [ask(feeder, 2, is_gone=left.is_set) for _ in range(INTERACTIVE_SLOTS - 1)]
            last = ask(feeder, 3)
            await pair.settle(lambda: feeder.networks.default.queued(bulk=False) == 1)
            if reason == "client_gone":
                left.set()
            else:
                for task in others:
                    task.cancel()
            # While the backend still stands: it is the slots that it waited for.
            await pair.settle(lambda: feeder.networks.default.queued(bulk=False) == 0)
            gone = ClientGone if reason == "client_gone" else asyncio.CancelledError
            for task in others:
                with pytest.raises(gone):
                    await task
            await pair.settle(
                lambda: pair.owner.networks.default.waiting(bulk=False) == INTERACTIVE_SLOTS
            )
            backend.open.set()
            assert await first == [1]
            assert await last == [3]
            assert backend.batches == [[1], [3]]
            assert dropped(pair.owner, reason) == INTERACTIVE_SLOTS - 1

    run(scenario)


def test_a_deadline_holds_at_the_owner_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend) as pair:
            (feeder,) = pair.feeders
            backend.open.clear()
            first = ask(feeder, 1)
            await pair.settle(lambda: bool(backend.batches))
            late = ask(feeder, 2, seconds=0.2)
            # Once it is there its deadline is fixed; on a slow machine it may have passed before.
            await pair.settle(
                lambda: (
                    pair.owner.networks.default.waiting(bulk=False) == 1
                    or dropped(feeder, "deadline") == 1
                )
            )
            passed = time.perf_counter() + 0.2
            await pair.settle(lambda: time.perf_counter() > passed)
            backend.open.set()
            assert await first == [1]
            with pytest.raises(DeadlineExceeded):
                await late
            assert await ask(feeder, 3) == [3]
            assert backend.batches == [[1], [3]]
            assert dropped(pair.owner, "deadline") + dropped(feeder, "deadline") == 1

    run(scenario)


def test_a_bad_photo_harms_no_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend, 2) as pair:
            backend.open.clear()
            first = ask(pair.feeders[0], 1)
            await pair.settle(lambda: bool(backend.batches))
            bad, good = ask(pair.feeders[0], 2, POISON, 3), ask(pair.feeders[1], 4)
            await pair.settle(lambda: pair.owner.networks.default.waiting(bulk=False) == 4)
            backend.open.set()
            assert await first == [1]
            assert await good == [4]
            with pytest.raises(InferenceFailed, match="twice"):
                await bad
            assert all(feeder.is_ready for feeder in pair.feeders)
            assert await ask(pair.feeders[0], 5) == [5]

    run(scenario)


def test_bulk_takes_no_slot_from_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend) as pair:
            (feeder,) = pair.feeders
            backend.open.clear()
            first = ask(feeder, 1)
            await pair.settle(lambda: bool(backend.batches))
            bulk = ask(feeder, *[2] * (INTERACTIVE_SLOTS + BULK_SLOTS), bulk=True)
            await pair.settle(lambda: pair.owner.networks.default.waiting(bulk=True) == BULK_SLOTS)
            assert feeder.networks.default.queued(bulk=True) == INTERACTIVE_SLOTS
            assert feeder.networks.default.longest_wait_s() > 0
            interactive = ask(feeder, 3)
            await pair.settle(lambda: pair.owner.networks.default.waiting(bulk=False) == 1)
            backend.open.set()
            assert await first == [1]
            assert await interactive == [3]
            assert 3 in backend.batches[1]
            assert await bulk == [2] * (INTERACTIVE_SLOTS + BULK_SLOTS)

    run(scenario)


def test_a_network_stays_until_the_last_request_that_began_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        old, new = OpenBackend("old"), OpenBackend("new")
        async with shared(tmp_path, old, 2) as pair:
            feeder, other = pair.feeders
            with feeder.networks.default.pinned() as pin:
                await pair.owner.use(new)
                await pair.settle(lambda: feeder.backend.name == other.backend.name == "new")
                assert await ask(feeder, 1, pin=pin) == [1]
                assert old.batches == [[1]]
                new.batches.clear()
                assert await ask(feeder, 2) == await ask(other, 2) == [2]
                assert new.batches == [[2], [2]]
                assert not old.closed
            await pair.settle(lambda: old.closed)
            assert await ask(feeder, 3) == [3]
            assert feeder.backend == new.info

    run(scenario)


def test_what_a_feeder_left_behind_is_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        old, new = OpenBackend("old"), OpenBackend("new")
        async with shared(tmp_path, old, 2) as pair:
            dying, other = pair.feeders
            old.open.clear()
            first = ask(dying, 1)
            await pair.settle(lambda: bool(old.batches))
            second = ask(dying, 2)
            await pair.settle(lambda: pair.owner.networks.default.waiting(bulk=False) == 1)
            swapping = asyncio.create_task(pair.owner.use(new))
            await pair.settle(lambda: other.backend.name == "new")
            await pair.links[0].close()
            for task in (first, second):
                with pytest.raises(Unavailable):
                    await task
            assert not dying.is_ready
            old.open.set()
            await swapping
            await pair.settle(lambda: old.closed)
            assert old.batches == [[1]]
            # Another takes its number, and its slots.
            successor = await pair.join(0)
            await pair.settle(lambda: successor.is_ready)
            assert await ask(successor, 3) == [3]
            assert await ask(other, 4) == [4]

    run(scenario)


def test_a_network_that_fails_is_used_by_nobody_until_there_is_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend()
        async with shared(tmp_path, backend, 2) as pair:
            for _ in range(FAILURES):
                with pytest.raises((InferenceFailed, Unavailable)):
                    await ask(pair.feeders[0], POISON)
            await pair.settle(lambda: not any(feeder.is_ready for feeder in pair.feeders))
            backend.batches.clear()
            for feeder in pair.feeders:
                with pytest.raises(Unavailable, match="anew"):
                    await ask(feeder, 1)
            assert not backend.batches
            await pair.links[0].close()
            latecomer = await pair.join(0)
            await pair.owner.use(OpenBackend("another"))
            await pair.settle(lambda: latecomer.is_ready and pair.feeders[1].is_ready)
            assert await ask(pair.feeders[1], 2) == [2]
            assert await ask(latecomer, 3) == [3]

    run(scenario)


def test_all_feeders_together_decode_as_far_ahead_as_one_would(tmp_path: Path) -> None:
    async def scenario() -> None:
        backend = OpenBackend(most=64)
        async with shared(tmp_path, backend, 4) as pair:
            feeder = pair.feeders[0]
            decoders = feeder.settings.decoders
            async with contextlib.AsyncExitStack() as turns:
                for _ in range(2 * 64 // 4 + decoders):
                    await turns.enter_async_context(feeder.networks.default.turns[False].turn())
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(
                        turns.enter_async_context(feeder.networks.default.turns[False].turn()), 0.01
                    )

    run(scenario)


def test_an_administrator_reaches_the_owner(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, OpenBackend()) as pair:
            problems: list[BackendError] = []

            async def reload() -> None:
                if problems:
                    raise problems[0]
                await pair.owner.use(OpenBackend("again"))

            pair.owner.reload = reload
            assert (await pair.links[0].reload()).name == "again"
            problems.append(BackendError("no network in there"))
            with pytest.raises(BackendError, match="in there"):
                await pair.links[0].reload()
            assert await ask(pair.feeders[0], 1) == [1]

    run(scenario)


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x01\x00\x00\x00\xff",
        b'\x01\x0f\x00\x00\x00{"feeder": -10}',
        b"\x01\x02\x00\x00\x00{]",
    ],
)
def test_what_speaks_another_language_is_cut_off(
    tmp_path: Path, bytes_sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with shared(tmp_path, OpenBackend()) as pair:
            reader, writer = await asyncio.open_unix_connection(pair.path)
            writer.write(bytes_sent)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            assert await ask(pair.feeders[0], 1) == [1]

    run(scenario)


def test_attempts_to_reach_an_owner_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feeding, "_PAUSE_S", 0.001)
    caplog.set_level(logging.DEBUG, "slsnet.sharing")

    async def test() -> None:
        service, memory = Service(Settings(), Metrics()), new_memory()
        link = Link(service, Address(str(tmp_path / "nobody"), memory, 0))
        await link.start()
        while caplog.text.count("no way to the network's process") < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        gc.collect()
        # The one that is about to try may be there. Some objects of libraries warn at `isinstance`.
        assert sum(type(one) is feeding._OwnerLink for one in gc.get_objects()) <= 1
        await link.close()
        await service.close()
        os.close(memory)

    # Workers run on it.
    uvloop.run(asyncio.wait_for(test(), 60))


def test_the_memory_can_not_be_made_smaller() -> None:
    memory = new_memory()
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 0)
    finally:
        os.close(memory)


def test_each_network_has_its_own_queue_and_failures(tmp_path: Path) -> None:
    async def test() -> None:
        first, second = OpenBackend("first"), OpenBackend("second")
        async with shared(tmp_path, first, models="other=none.onnx") as pair:
            (feeder,) = pair.feeders
            owned = pair.owner.networks.named("other")
            with pytest.raises(Unavailable, match="still being loaded"):
                feeder.check_ready("other")
            await pair.owner.use(second, served=owned)
            other = feeder.networks.named("other")
            await pair.settle(lambda: other.works)
            second.batches.clear()
            # One that is held does not hold up the other.
            second.open.clear()
            waiting = ask(feeder, 7, named="other")
            assert await ask(feeder, 1) == [1]
            second.open.set()
            assert await waiting == [7]
            assert (first.batches, second.batches) == ([[1]], [[7]])
            for _ in range(FAILURES):
                with pytest.raises((InferenceFailed, Unavailable)):
                    await ask(feeder, POISON, named="other")
            await pair.settle(lambda: other.is_failing)
            assert feeder.is_ready
            assert await ask(feeder, 2) == [2]
            # It keeps no newcomer from serving the other.
            await pair.links[0].close()
            feeder = await pair.join(0)
            await pair.settle(lambda: feeder.is_server_ready)
            with pytest.raises(Unavailable, match="anew"):
                await ask(feeder, 2, named="other")
            assert await ask(feeder, 2) == [2]
            other = feeder.networks.named("other")
            # One that is brought back takes over, and one that is retired is told.
            await pair.owner.use(OpenBackend("third"), served=owned)
            await pair.settle(lambda: other.works)
            assert await ask(feeder, 3, named="other") == [3]
            pair.owner.retire("other", "it is gone")
            await pair.settle(lambda: "other" not in feeder.networks)
            assert feeder.networks.refusals == {"other": "it is gone"}
            assert await ask(feeder, 4) == [4]

    run(test)
