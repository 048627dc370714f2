"""Idle-aware batching, on a backend whose pace the tests set."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from server.backends import BackendError, BackendInfo, Images
from server.inference import batching
from server.inference.batching import FAILURES, Batcher, Inference
from server.inference.errors import ClientGone, DeadlineExceeded, InferenceFailed, Unavailable
from server.observe.metrics import Metrics
from tests.support.backends import POISON, Held

FAR = math.inf
"""The deadline of what has none."""


class HeldBackend(Held):
    """It ends a batch for each permit of its gate."""

    def __init__(self, *, slots: int = 1, buckets: tuple[int, ...] = ()) -> None:
        self.gate = threading.Semaphore(0)
        super().__init__(
            BackendInfo("held", "1", "cpu", "fp32", max_batch=4, slots=slots, buckets=buckets),
            lambda: self.gate.acquire(timeout=600),
        )


def image(value: int) -> NDArray[np.uint8]:
    return np.full((128, 128, 3), value, np.uint8)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine with a limit, so that a lost image fails instead of hanging."""
    asyncio.run(asyncio.wait_for(test(), 60))


async def settle(expected: Callable[[], bool] = lambda: True) -> None:
    """Wait for what must happen, then let everything else happen that can without the gate."""
    while not expected():  # noqa: ASYNC110  # a thread makes it so
        await asyncio.sleep(0.002)
    for _ in range(20):
        await asyncio.sleep(0.002)


async def infer(batcher: Batcher, value: int, **options: Any) -> Inference:
    options.setdefault("deadline", FAR)
    (inference,) = await batcher.submit([image(value)], **options)
    return inference


def ask(batcher: Batcher, value: int, **options: Any) -> asyncio.Task[Inference]:
    return asyncio.create_task(infer(batcher, value, **options))


def submit(batcher: Batcher, *values: int, bulk: bool) -> list[asyncio.Future[list[Inference]]]:
    """Photos of one request."""
    return [batcher.submit([image(value) for value in values], deadline=FAR, bulk=bulk)]


def value_of(task: asyncio.Future[Inference]) -> int:
    return value_in(task.result())


def value_in(inference: Inference) -> int:
    return round(float(inference.probability[0, 0]) * 255)


def test_idle_backend_starts_at_once_and_a_busy_one_gathers() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        batcher = Batcher(backend, Metrics())
        tasks = [ask(batcher, 1)]
        await settle(lambda: len(backend.batches) == 1)
        assert backend.batches == [[1]]

        tasks += [ask(batcher, value) for value in range(2, 9)]
        await settle()
        assert backend.batches == [[1]]

        for count, expected in ((2, [2, 3, 4, 5]), (3, [6, 7, 8])):
            backend.gate.release()
            await settle(lambda count=count: len(backend.batches) == count)  # type: ignore[misc]
            assert backend.batches[-1] == expected
        backend.gate.release()
        await asyncio.gather(*tasks)
        # Each gets its own answer, in whichever company it was.
        assert [value_of(task) for task in tasks] == list(range(1, 9))
        assert [task.result().batch_size for task in tasks] == [1, 4, 4, 4, 4, 3, 3, 3]
        await batcher.close()
        assert backend.closed

    run(scenario)


def test_every_slot_is_used_before_anyone_waits() -> None:
    async def scenario() -> None:
        backend = HeldBackend(slots=2)
        batcher = Batcher(backend, Metrics())
        tasks = [ask(batcher, value) for value in (1, 2, 3, 4)]
        await settle(lambda: len(backend.batches) == 2)
        started = sorted(backend.batches)
        assert len(started) == 2
        backend.gate.release(4)
        await asyncio.gather(*tasks)
        await batcher.close()

    run(scenario)


def test_max_batch_of_one_turns_batching_off() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        backend.gate.release(10)
        batcher = Batcher(backend, Metrics(), max_batch=1)
        await asyncio.gather(*(ask(batcher, value) for value in range(5)))
        assert [len(batch) for batch in backend.batches] == [1] * 5

    run(scenario)


def test_a_thread_that_comes_free_begins_the_next_photo_without_the_event_loop() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        batcher = Batcher(backend, Metrics(), max_batch=1)
        tasks = [ask(batcher, value) for value in (1, 2, 3)]
        await settle(lambda: len(backend.batches) == 1)
        backend.gate.release()
        give_up = time.perf_counter() + 60
        while len(backend.batches) == 1 and time.perf_counter() < give_up:
            time.sleep(0.002)  # noqa: ASYNC251  # the loop is held on purpose
        assert backend.batches == [[1], [2]]
        backend.gate.release(2)
        await asyncio.gather(*tasks)
        await batcher.close()

    run(scenario)


def test_images_go_to_the_backend_as_they_came_and_padding_is_its_own_affair() -> None:
    async def scenario() -> None:
        given: list[Images] = []

        class Collects(HeldBackend):
            def infer(self, batch: Images) -> NDArray[np.float32]:
                given.append(batch)
                return super().infer(batch)

        backend = Collects(buckets=(1, 2, 4))
        backend.gate.release(2)
        metrics = Metrics()
        batcher = Batcher(backend, metrics, max_batch=64)
        first = ask(batcher, 1)
        images = [image(value) for value in (2, 3, 4)]
        answers = await batcher.submit(images, deadline=FAR)
        await first
        assert [value_in(answer) for answer in answers] == [2, 3, 4]
        assert backend.batches == [[2, 3, 4], [1]] or backend.batches == [[1], [2, 3, 4]]
        (several,) = (batch for batch in given if len(batch) == 3)
        assert all(ours is theirs for ours, theirs in zip(images, several, strict=True))
        assert metrics.registry.get_sample_value("slsnet_batch_padding_images_total") == 1

    run(scenario)


def test_a_request_fails_with_its_first_bad_photo_and_the_rest_is_dropped() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        backend.gate.release(20)
        metrics = Metrics()
        batcher = Batcher(backend, metrics, max_batch=2)
        with pytest.raises(InferenceFailed):
            await batcher.submit([image(v) for v in (1, POISON, 3, 4)], deadline=FAR)
        assert (await ask(batcher, 5)).batch_size == 1
        assert backend.batches == [[1, POISON], [1], [POISON], [5]]
        dropped = metrics.registry.get_sample_value("slsnet_dropped_total", {"reason": "abandoned"})
        assert dropped == 2

    run(scenario)


def test_one_bad_image_fails_alone() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        metrics = Metrics()
        batcher = Batcher(backend, metrics)
        first = ask(batcher, 1)
        await settle()
        tasks = [ask(batcher, value) for value in (2, POISON, 4)]
        backend.gate.release(20)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert isinstance(results[1], InferenceFailed)
        assert isinstance(results[1].__cause__, BackendError)
        assert [value_of(tasks[0]), value_of(tasks[2])] == [2, 4]
        assert backend.batches == [[1], [2, POISON, 4], [2], [POISON], [4]]
        assert metrics.registry.get_sample_value("slsnet_batch_failures_total") == 1
        # The backend goes on being used.
        assert (await ask(batcher, 5)).batch_size == 1

    run(scenario)


def test_a_backend_that_always_fails_is_given_nothing_more() -> None:
    async def scenario() -> None:
        backend = HeldBackend(slots=2)
        told: list[bool] = []
        batcher = Batcher(backend, Metrics(), on_failing=lambda: told.append(True))
        tasks = [ask(batcher, POISON) for _ in range(30)]
        backend.gate.release(1000)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {InferenceFailed, Unavailable}
        assert len(backend.batches) <= FAILURES + backend.info.slots
        assert batcher.is_failing
        with pytest.raises(Unavailable):
            await infer(batcher, 1)
        assert told == [True]
        await batcher.close()
        assert backend.closed

    run(scenario)


def test_a_backend_that_hangs_is_given_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test does not wait for so long.
    monkeypatch.setattr(batching, "HUNG_S", 0.2)

    async def scenario() -> None:
        backend = HeldBackend()
        told: list[bool] = []
        batcher = Batcher(backend, Metrics(), on_failing=lambda: told.append(True))
        tasks = [ask(batcher, value) for value in range(10)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {Unavailable}
        assert len(backend.batches) == 1
        assert batcher.is_failing
        assert told == [True]
        await batcher.close()
        # A thread is in there still.
        assert not backend.closed
        backend.gate.release()

    run(scenario)


@pytest.mark.parametrize("wrong", ["shape", "nan"])
def test_an_answer_that_is_none_is_a_failure(wrong: str) -> None:
    class Wrong(HeldBackend):
        def infer(self, batch: Images) -> NDArray[np.float32]:
            count = 0 if wrong == "shape" else len(batch)
            return np.full((count, 128, 128), np.nan, np.float32)

    async def scenario() -> None:
        with pytest.raises(InferenceFailed):
            await infer(Batcher(Wrong(), Metrics()), 1)

    run(scenario)


def test_who_is_gone_or_late_is_not_inferred() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        metrics = Metrics()
        batcher = Batcher(backend, metrics)
        gone = threading.Event()
        busy = ask(batcher, 1)
        await settle()
        hung_up = ask(batcher, 2, is_gone=gone.is_set)
        late = ask(batcher, 3, deadline=time.perf_counter() + 0.01)
        cancelled = ask(batcher, 4)
        good = ask(batcher, 5)
        await settle()
        gone.set()
        cancelled.cancel()
        backend.gate.release(10)
        results = await asyncio.gather(busy, hung_up, late, cancelled, good, return_exceptions=True)
        assert isinstance(results[1], ClientGone)
        assert isinstance(results[2], DeadlineExceeded)
        assert isinstance(results[3], asyncio.CancelledError)
        assert value_of(good) == 5
        assert backend.batches == [[1], [5]]
        dropped = {
            reason: metrics.registry.get_sample_value("slsnet_dropped_total", {"reason": reason})
            for reason in ("client_gone", "deadline", "abandoned")
        }
        assert dropped == {"client_gone": 1, "deadline": 1, "abandoned": 1}

    run(scenario)


def test_max_wait_fills_a_batch_of_an_idle_backend() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        backend.gate.release(10)
        batcher = Batcher(backend, Metrics(), max_wait_ms=600_000)
        tasks = [ask(batcher, 1)]
        await settle()
        assert backend.batches == []
        # A full batch waits for nobody.
        tasks += [ask(batcher, value) for value in (2, 3, 4)]
        await asyncio.gather(*tasks)
        assert backend.batches == [[1, 2, 3, 4]]
        await batcher.close()

    run(scenario)


def test_who_stays_alone_waits_no_longer_than_max_wait() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        backend.gate.release(10)
        batcher = Batcher(backend, Metrics(), max_wait_ms=50)
        assert (await ask(batcher, 1)).batch_size == 1
        await batcher.close()

    run(scenario)


def test_interactive_goes_first_and_bulk_does_not_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a slow machine bulk would run one by one.
    monkeypatch.setattr(batching, "BULK_RUN_S", 3600)

    async def scenario() -> None:
        backend = HeldBackend()
        batcher = Batcher(backend, Metrics(), max_batch=3)
        results = submit(batcher, 100, bulk=True)
        await settle()
        # While one bulk photo runs more of both kinds come.
        results += submit(batcher, 101, 102, 103, bulk=True)
        results += submit(batcher, *range(1, 13), bulk=False)
        backend.gate.release(100)
        await asyncio.gather(*results)
        mixed = [[100], [1, 2, 3], [4, 5, 6], [7, 8, 9], [101, 10, 11], [12]]
        assert backend.batches[:6] == mixed
        # How many bulk photos run together depends on how long one takes.
        assert [value for batch in backend.batches[6:] for value in batch] == [102, 103]
        answers = [[value_in(one) for one in result.result()] for result in results]
        assert answers == [[100], [101, 102, 103], [*range(1, 13)]]
        await batcher.close()

    run(scenario)


def test_bulk_has_its_turns_in_large_batches_too() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        batcher = Batcher(backend, Metrics(), max_batch=32)
        results = submit(batcher, 1, bulk=False)
        await settle()
        results += submit(batcher, *range(100, 110), bulk=True)
        results += submit(batcher, *range(2, 82), bulk=False)
        backend.gate.release(100)
        await asyncio.gather(*results)
        bulk = [sum(value >= 100 for value in batch) for batch in backend.batches]
        assert [len(batch) for batch in backend.batches[:4]] == [1, 32, 32, 23]
        assert bulk[:4] == [0, 0, 4, 3]
        await batcher.close()

    run(scenario)


def test_bulk_takes_the_seats_that_would_be_padding() -> None:
    async def scenario() -> None:
        backend = HeldBackend(buckets=(1, 4))
        batcher = Batcher(backend, Metrics())
        results = submit(batcher, 1, bulk=False)
        await settle()
        results += submit(batcher, 101, 102, 103, bulk=True) + submit(batcher, 2, 3, bulk=False)
        backend.gate.release(100)
        await asyncio.gather(*results)
        assert backend.batches == [[1], [2, 3, 101, 102], [103]]
        await batcher.close()

    run(scenario)


def test_a_run_of_bulk_alone_is_short() -> None:
    async def scenario() -> None:
        class Slow(HeldBackend):
            def infer(self, batch: Images) -> NDArray[np.float32]:
                # How long a run takes is what decides how long the next one is.
                time.sleep(0.06 * len(batch))
                return super().infer(batch)

        backend = Slow()
        backend.gate.release(100)
        batcher = Batcher(backend, Metrics())
        await asyncio.gather(*submit(batcher, *range(100, 104), bulk=True))
        assert [len(batch) for batch in backend.batches] == [1, 1, 1, 1]
        await batcher.close()

    run(scenario)


def test_close_finishes_what_was_accepted() -> None:
    async def scenario() -> None:
        backend = HeldBackend()
        batcher = Batcher(backend, Metrics())
        tasks = [ask(batcher, value) for value in range(6)]
        await settle()
        closing = asyncio.create_task(batcher.close())
        await settle()
        assert not closing.done()
        backend.gate.release(10)
        await closing
        assert backend.closed
        assert [value_of(task) for task in tasks] == list(range(6))

    run(scenario)
