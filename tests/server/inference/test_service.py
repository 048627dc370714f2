"""The service's life: another backend takes over while requests are under way."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from photos.image import CorruptImageError, Photo, read_photo
from server.http.answers import png_answer
from server.http.app import create_app
from server.http.segment import masks
from server.inference import submission as submission_module
from server.inference.errors import (
    ClientGone,
    DeadlineExceeded,
    TooLarge,
    Unavailable,
    Unprocessable,
    UnsupportedType,
)
from server.inference.service import Service
from server.inference.submission import Body, Received, Segmentation, submitted
from server.observe.metrics import Metrics
from server.observe.stages import Stages
from server.settings import Settings
from tests.support.backends import Constant
from tests.support.lesions import drawn_photo
from tests.support.memory import traced


def submit(
    service: Service, body: Body, timeout_s: float = 60, *, bulk: bool = False
) -> contextlib.AbstractAsyncContextManager[Received[Body]]:
    """From a client that never hangs up."""

    async def read(take: Callable[[int], None]) -> Body:
        take(len(body.data))
        return body

    return submitted(service, asyncio.Event().wait, Stages(), timeout_s, read, bulk=bulk)


def test_another_backend_takes_over_without_a_failed_request() -> None:
    body = drawn_photo(1, 300, 200)

    async def segment(service: Service) -> Segmentation:
        async with submit(service, Body(body)) as received, received.work() as work:
            return await work.segment()

    async def scenario() -> None:
        service = Service(Settings(max_wait_ms=5), Metrics())
        with pytest.raises(Unavailable):
            async with submit(service, Body(body)):
                pass
        backends = [Constant(value / 8) for value in range(1, 8)]
        await service.use(backends[0])
        tasks = []
        for backend in backends[1:]:
            tasks += [asyncio.create_task(segment(service)) for _ in range(15)]
            await asyncio.wait(tasks[-15:], return_when=asyncio.FIRST_COMPLETED)
            await service.use(backend)
        results = await asyncio.gather(*tasks)
        await service.close()
        # Each answer is of one backend, the one that it names.
        for result in results:
            assert (result.probability == float(result.backend.version)).all()
        assert len({result.backend.version for result in results}) > 3
        assert all(backend.closed for backend in backends)

    asyncio.run(asyncio.wait_for(scenario(), 60))


BODY_BYTES = 2**23


@contextlib.contextmanager
def counted_bodies() -> Iterator[Callable[[], int]]:
    """Gives what tells how many bodies of this size memory holds."""
    with traced() as held_bytes:
        yield lambda: round(held_bytes() / BODY_BYTES)


def test_bodies_that_wait_for_a_thread_go_at_their_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(_data: bytes, **_options: object) -> None:
        begun.release()
        go_on.wait(600)
        raise CorruptImageError("It is.")

    monkeypatch.setattr(submission_module, "read_photo", slow)

    async def request(service: Service) -> None:
        body = Body(bytes(BODY_BYTES))
        async with submit(service, body, 5) as received, received.work() as work:
            await work.segment()

    async def scenario(bodies: Callable[[], int]) -> None:
        service = Service(Settings(decode_threads=1), Metrics())
        await service.use(Constant(0.5))
        try:
            requests = [asyncio.create_task(request(service)) for _ in range(5)]
            await asyncio.to_thread(begun.acquire, timeout=600)
            assert bodies() == 5
            # With their exceptions, which have the frames that the bodies came through.
            for outcome in await asyncio.gather(*requests, return_exceptions=True):
                assert isinstance(outcome, DeadlineExceeded)
            # The one that a thread is at work on.
            assert bodies() == 1
            go_on.set()
            assert await service.threads.run(lambda: "next") == "next"
            assert bodies() == 0
            assert not begun.acquire(blocking=False)
        finally:
            go_on.set()
            await service.close()

    with counted_bodies() as bodies:
        asyncio.run(asyncio.wait_for(scenario(bodies), 60))


def test_arguments_that_wait_for_a_thread_go_when_cancelled() -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        begun.release()
        go_on.wait(30)

    async def scenario(bodies: Callable[[], int]) -> None:
        service = Service(Settings(decode_threads=1), Metrics())
        try:
            for alone in (False, True):
                go_on.clear()
                first = asyncio.create_task(service.threads.run(hold, alone=alone))
                second = asyncio.create_task(
                    service.threads.run(len, bytes(BODY_BYTES), alone=alone)
                )
                assert await asyncio.to_thread(begun.acquire, timeout=30)
                assert bodies() == 1
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await second
                del second
                assert bodies() == 0
                # One that has begun keeps its thread.
                first.cancel()
                third = asyncio.create_task(service.threads.run(len, b"four", alone=alone))
                finished, _ = await asyncio.wait({third}, timeout=0.1)
                assert not finished
                go_on.set()
                assert await third == 4
        finally:
            go_on.set()
            await service.close()

    with counted_bodies() as bodies:
        asyncio.run(asyncio.wait_for(scenario(bodies), 60))


def test_what_is_wrong_with_a_photo_does_not_keep_it() -> None:
    async def scenario(bodies: Callable[[], int]) -> None:
        service = Service(Settings(decode_threads=1), Metrics())
        await service.use(Constant(0.5))
        body = Body(bytes(BODY_BYTES))

        async def segment() -> None:
            async with submit(service, body) as received, received.work() as work:
                await work.segment()

        try:
            await service.drain.unless_given_up(segment())
        except UnsupportedType:
            assert bodies() == 1
        # The loop's own references go with its next turn, the thread's before its next work.
        assert await service.threads.run(lambda: "next") == "next"
        assert bodies() == 0
        await service.close()

    with counted_bodies() as bodies:
        asyncio.run(asyncio.wait_for(scenario(bodies), 60))


LONE = drawn_photo(4, 600, 450)


@pytest.mark.parametrize(
    ("name", "data", "requests", "bulk", "on_the_loop"),
    [
        ("alone", LONE, 1, False, True),
        ("not alone", LONE, 2, False, False),
        ("bulk", LONE, 1, True, False),
        ("many pixels", drawn_photo(4, 1024, 768), 1, False, False),
        ("many bytes", LONE + bytes(2**17), 1, False, False),
        ("progressive", drawn_photo(4, progressive=True), 1, False, False),
        ("not a JPEG", drawn_photo(4, 64, 64, "PNG"), 1, False, False),
    ],
)
def test_only_a_lone_small_photo_is_decoded_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    data: bytes,
    requests: int,
    bulk: bool,
    on_the_loop: bool,
) -> None:
    decoded: list[tuple[threading.Thread, NDArray[np.uint8]]] = []

    def reads(data: bytes, **limits: Any) -> Photo:
        photo = read_photo(data, **limits)
        decoded.append((threading.current_thread(), photo.pixels))
        return photo

    async def scenario() -> None:
        service = Service(Settings(), Metrics())
        await service.use(Constant(0.5))
        monkeypatch.setattr(submission_module, "read_photo", reads)
        with service.gate.places(requests - 1, bulk=bulk):
            async with submit(service, Body(data), bulk=bulk) as received, received.work() as work:
                found = await work.segment(bare=True)
        await service.close()
        assert found.width, name

    asyncio.run(scenario())
    ((thread, pixels),) = decoded
    assert (thread is threading.main_thread()) is on_the_loop
    assert np.array_equal(pixels, read_photo(data).pixels)


def test_what_is_wrong_with_a_lone_photo_is_told_as_ever() -> None:
    async def scenario() -> None:
        service = Service(Settings(), Metrics())
        await service.use(Constant(0.5))
        half = Body(LONE[: len(LONE) // 2])
        async with submit(service, half) as received, received.work() as work:
            with pytest.raises(Unprocessable):
                await work.segment(bare=True)
        await service.close()

    asyncio.run(scenario())


def test_a_small_mask_does_not_wait_behind_photos_to_be_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[str] = []

    def makes(*arguments: Any, **options: Any) -> tuple[bytes, float | None]:
        threads.append(threading.current_thread().name.partition("_")[0])
        return png_answer(*arguments, **options)

    monkeypatch.setattr(masks, "png_answer", makes)
    large = drawn_photo(4, 1024, 768)

    async def scenario() -> None:
        app, service = create_app(Settings())
        await service.use(Constant(0.75))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for photo, query in ((LONE, ""), (large, ""), (LONE, "?clean=true")):
                answer = await client.post(f"/segment{query}", content=photo)
                assert answer.status_code == 200
            bulk = await client.post("/segment", content=LONE, headers={"Priority": "bulk"})
            assert bulk.status_code == 200
        await service.close()

    asyncio.run(scenario())
    assert threads[0] not in ("work", "bulk")
    assert threads[1:] == ["work", "work", "bulk"]


def test_photos_that_take_seconds_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def reads(data: bytes, **limits: Any) -> Photo:
        photo = read_photo(data, **limits)
        if photo.width > 4000:
            begun.release()
            assert go_on.wait(60)
        return photo

    monkeypatch.setattr(submission_module, "read_photo", reads)
    out = BytesIO()
    Image.new("L", (4200, 4200)).save(out, "PNG")
    large, small = out.getvalue(), drawn_photo(4, 64, 64, "PNG")

    async def segment(service: Service, data: bytes) -> Segmentation:
        async with submit(service, Body(data)) as received, received.work() as work:
            return await work.segment()

    async def scenario() -> None:
        service = Service(Settings(decode_threads=2), Metrics())
        await service.use(Constant(0.5))
        slow = [asyncio.create_task(segment(service, large)) for _ in range(3)]
        await asyncio.to_thread(begun.acquire, timeout=600)
        found = await segment(service, small)
        assert found.width == 64 and not any(task.done() for task in slow)
        go_on.set()
        assert {(await task).width for task in slow} == {4200}
        # What is too large for anybody is told as ever.
        with pytest.raises(TooLarge):
            await segment(service, _png_head(9000, 9000))
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def _png_head(width: int, height: int) -> bytes:
    out = BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_the_bytes_of_a_body_count_until_the_request_is_over() -> None:
    async def scenario() -> None:
        service = Service(Settings(), Metrics())
        await service.use(Constant(0.5))
        budget = service.gate.body_bytes
        body = Body(LONE)
        async with submit(service, body) as received:
            assert budget.used == len(LONE)
            async with received.work() as work:
                await work.segment()
        assert budget.used == 0
        # Also of one that nobody worked on.
        body = Body(LONE)
        async with submit(service, body):
            assert budget.used == len(LONE)
        assert budget.used == 0
        with pytest.raises(ClientGone):
            body.take()
        await service.close()

    asyncio.run(scenario())


def test_a_request_is_worked_on_once_and_not_after_its_end() -> None:
    async def scenario() -> None:
        service = Service(Settings(max_queue=8), Metrics())
        await service.use(Constant(0.5))

        async def refused(received: Received[Body]) -> None:
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    received.work_on_many(1)
                with pytest.raises(RuntimeError):
                    async with received.work():
                        pass

        async with submit(service, Body(LONE)) as received:
            async with received.work(2, places=2, bulk=True) as work:
                assert work.bulk
                await refused(received)
            await refused(received)
        await refused(received)
        async with submit(service, Body(LONE)) as received:
            many = received.work_on_many(2)
            await refused(received)
        with pytest.raises(RuntimeError):
            async with many.work(Body(LONE), Stages()):
                pass
        # None of it is counted any more: neither places, nor bytes, nor photos of either kind.
        gate = service.gate
        assert (gate.admitted, gate.body_bytes.used) == (0, 0)
        assert [gate.wait_s(bulk=bulk) for bulk in (False, True)] == [0, 0]
        assert not [pace.photos for pace in gate.paces(bulk=True) if pace.photos]
        await service.close()

    asyncio.run(scenario())


def test_what_the_body_says_of_its_priority_counts_before_work_begins() -> None:
    async def scenario() -> None:
        service = Service(Settings(), Metrics())
        await service.use(Constant(0.5))
        all_photos, bulk_photos = service.gate.paces(bulk=True)
        async with submit(service, Body(b"-")) as received:
            async with received.work(3, places=3, bulk=True):
                assert (all_photos.photos, bulk_photos.photos) == (3, 3)
            assert (all_photos.photos, bulk_photos.photos) == (0, 0)
        async with submit(service, Body(b"-")) as received:
            with pytest.raises(DeadlineExceeded):
                async with received.work(timeout_us=1):
                    await asyncio.Event().wait()
            assert all_photos.photos == 0
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
