"""A request from its admission to its answer: one object owns its body, deadline and place.

    async with submitted(service, hung_up, stages, timeout_s, read) as received:
                                                    a place or a refusal; then bytes that count
        async with received.work() as work:         checked once more, begun
            segmentation = await work.segment()     decode, queue, network
            content = await work.encode(...)
                                                    over, served or not

Each step is a method of what the step before it gave, so none can be left out. Only `Work` reaches
the network. It is given once for a request, or once for each photo of `Many`.

Decoding and masks run in a pool of threads, inference in the batcher's threads. The event loop
itself makes only small masks, and decodes a lone small photo. If the client hangs up, its work is
dropped before the next stage.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from photos.dicom.process import Spacing
from photos.image import ImageError as PhotoError
from photos.image import Photo, is_baseline_jpeg, read_photo
from server.backends import BackendInfo
from server.inference.admission import Place
from server.inference.batching import Inference
from server.inference.deadline import Deadline
from server.inference.errors import ClientGone, TooLarge, of_photo_error
from server.inference.served import Served
from server.inference.service import Service
from server.observe.stages import Stages

__all__ = ["Body", "Many", "Received", "Segmentation", "Work", "submitted"]

Arguments = TypeVarTuple("Arguments")
Content = TypeVar("Content")
Result = TypeVar("Result")

# The largest photo that is decoded on the event loop, when it is alone.
_SMALL_PIXELS = 2**19
_SMALL_BYTES = 2**17

# Larger photos have threads of their own, except for a JPEG of one scan, which decodes scaled down.
_SLOW_PIXELS = 2**24

# Timers of the event loop may fire this much early.
_COARSE_S = 0.01


@dataclass(frozen=True)
class Segmentation:
    """A photo's lesion probability, before it becomes a mask."""

    probability: NDArray[np.float32]
    """float32 [128, 128]"""
    width: int
    """Width of the photo; like `height`, in pixels."""
    height: int
    orientation: int
    """EXIF orientation that was applied to the stored photo, 1 to 8."""
    batch_size: int
    """Photos that ran through the network together."""
    backend: BackendInfo
    """The backend that ran it."""
    pixels: NDArray[np.uint8]
    """uint8 [128, 128, 3], RGB: what the network saw."""
    spacing: Spacing | None = None
    """Millimetres of a pixel of the photo, across and down, if it tells them."""
    frame: int | None = None
    """Which frame of the photo's file it is, as it was asked for."""

    @property
    def is_small(self) -> bool:
        """Whether its mask takes no longer than a change of threads."""
        return self.width * self.height <= _SMALL_PIXELS


class Body:
    """The bytes of a body, or of a photo in it, until they are taken or let go.

    Callers, a pool's queue and tracebacks hold this object and not the bytes, so the bytes are
    freed as soon as they no longer count.
    """

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data
        self._is_wanted = True

    @property
    def data(self) -> bytes:
        """The bytes.

        Raises:
            ClientGone: they were let go, since nobody waits for the result.
        """
        if self._data is None:
            raise ClientGone
        return self._data

    def take(self) -> bytes:
        """Hand the bytes over: from now on only the caller has them."""
        try:
            return self.data
        finally:
            self._data = None

    def put(self, data: bytes) -> None:
        """Take the bytes back, unless they were let go meanwhile."""
        if self._is_wanted:
            self._data = data

    def let_go(self) -> None:
        """Free the bytes: nobody needs them."""
        self._data, self._is_wanted = None, False

    def __enter__(self) -> Self:
        """The bytes are let go at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


class _Request:
    """What the stages of a request share: its place, its deadline, and whether it is wanted."""

    def __init__(
        self,
        service: Service,
        network: Served,
        place: Place,
        hung_up: Callable[[], Awaitable[object]],
        stages: Stages,
        deadline: Deadline,
    ) -> None:
        self.service = service
        self.network = network
        """Runs its photos."""
        self.pin: str | None = None
        """What `Served.pinned` gave; None for what runs the network when a photo comes to it."""
        self.stages = stages
        self.deadline = deadline
        self.place = place
        self._hung_up = hung_up
        self._gone: asyncio.Future[object] | None = None
        self._is_checked = False
        self._is_over = False
        self._held = contextlib.ExitStack()

    def choose(self, network: str | None) -> None:
        """Let the network of this name run the photos; None for the one that does.

        Raises:
            UnknownNetwork: there is none.
            Unavailable: it is being loaded, or fails.
        """
        if network is None or network == self.network.name:
            # It may have been retired since the request came.
            return
        served = self.service.networks.named(network)
        served.check_works()
        self._held.enter_context(served.kept())
        self.network = served

    def pin_network(self) -> None:
        """Let what runs the network now run all photos."""
        self.pin = self._held.enter_context(self.network.pinned())

    def check(self, photos: int, places: int = 1, *, bulk: bool = False) -> None:
        """Check again, now that the body is there, and watch from now on whether the client leaves.

        Raises:
            Overloaded: they would be done too late, or there is no room for them.
            RuntimeError: the request was checked before, or is over.
        """
        if self._is_checked or self._is_over:
            raise RuntimeError("A request is worked on once, before it is over.")
        self._is_checked = True
        self.place.bulk |= bulk
        self.place.deadline = self.deadline.at
        self._held.enter_context(self.service.gate.places(places - 1, bulk=self.place.bulk))
        self.place.check(photos)
        self._gone = asyncio.ensure_future(self._hung_up())

    @property
    def gone(self) -> asyncio.Future[object]:
        """A task that ends when the client hangs up."""
        assert self._gone is not None
        return self._gone

    def is_gone(self) -> bool:
        """Whether the client hung up."""
        return self.gone.done() and not self.gone.cancelled()

    @contextlib.asynccontextmanager
    async def begun(self, photos: int) -> AsyncIterator[None]:
        """Count photos as worked on until the end of the block, at most until the deadline.

        Raises:
            DeadlineExceeded: it took too long.
            RuntimeError: the request is over.
        """
        if self._is_over:
            raise RuntimeError("The request is over.")
        self.place.begin(photos)
        served = False
        try:
            async with self.deadline.kept():
                yield
            served = True
        finally:
            self.place.end(photos, served=served)

    def close(self) -> None:
        """Stop watching the client, and give the places back."""
        self._is_over = True
        if self._gone is not None:
            self._gone.cancel()
        self._held.close()


class Received(Generic[Content]):
    """A request whose body is there. `submitted` makes it."""

    def __init__(self, request: _Request, body: Content) -> None:
        self.body = body
        """What was read: a `Body`, or the photos and the rest of a form."""
        self._request = request

    @property
    def network(self) -> Served:
        """Runs its photos."""
        return self._request.network

    def choose(self, network: str | None) -> None:
        """Let the network that the body names run the photos; None if it names none.

        Raises:
            UnknownNetwork: there is none of this name.
            Unavailable: it is being loaded, or fails.
        """
        self._request.choose(network)

    async def parse(
        self: "Received[Body]",
        parse: Callable[[Body, *Arguments], Result],
        *arguments: *Arguments,
        alone: bool = False,
    ) -> Result:
        """Parse the body in a thread, and let it go; `alone` is that of `Threads.run`.

        Raises:
            DeadlineExceeded: it took too long.
        """
        request, body = self._request, self.body
        try:
            async with request.deadline.kept():
                parsed = await request.service.threads.run(parse, body, *arguments, alone=alone)
        finally:
            body.let_go()
        request.stages.end("decode")
        return parsed

    @contextlib.asynccontextmanager
    async def work(
        self: "Received[Body]",
        photos: int = 1,
        *,
        places: int = 1,
        timeout_us: int | None = None,
        bulk: bool = False,
    ) -> AsyncIterator["Work"]:
        """Check again, now that the body is there, and work on its photos until the deadline.

        Args:
            photos: how many the body has.
            places: how many they take.
            timeout_us: what the body says of the deadline, microseconds from the request's start; a
                longer time than before changes nothing.
            bulk: whether the body says that interactive requests go first.

        Raises:
            Overloaded: they would be done too late, or there is no room for them.
            DeadlineExceeded: it took too long.
        """
        request = self._request
        if timeout_us is not None:
            request.deadline.shorten(timeout_us)
        request.check(photos, places, bulk=bulk)
        async with request.begun(photos):
            yield Work(request, request.stages, self.body)

    def work_on_many(self, photos: int) -> "Many":
        """Check as `work` does, and work on each of so many photos by itself.

        One load of the network answers all, whatever is loaded meanwhile.

        Raises:
            Overloaded: see `work`.
        """
        self._request.check(photos)
        self._request.pin_network()
        return Many(self._request)


class Many:
    """The photos of a request, each worked on by itself. `Received.work_on_many` makes it."""

    def __init__(self, request: _Request) -> None:
        self.deadline = request.deadline
        self.network = request.network
        self.gone = request.gone
        """A task that ends when the client hangs up."""
        self._request = request

    @contextlib.asynccontextmanager
    async def work(self, body: Body, stages: Stages) -> AsyncIterator["Work"]:
        """Work on the photo in `body`, until the deadline passes; `stages` is its stopwatch.

        Raises:
            DeadlineExceeded: it took too long.
        """
        async with self._request.begun(1):
            yield Work(self._request, stages, body)

    def give_back(self, body_bytes: int) -> None:
        """Free so many bytes of the request's body before its end."""
        self._request.place.take(-body_bytes)


@contextlib.asynccontextmanager
async def submitted(
    service: Service,
    hung_up: Callable[[], Awaitable[object]],
    stages: Stages,
    timeout_s: float,
    read: Callable[[Callable[[int], None]], Awaitable[Content]],
    *,
    bulk: bool = False,
    is_there: bool = False,
    network: str | None = None,
) -> AsyncIterator[Received[Content]]:
    """Admit a request and read its body: it has a place until the end of the block.

    Args:
        service: works on it.
        hung_up: waits until the client hangs up; called once the body is there.
        stages: the stopwatch, which began with the request.
        timeout_s: how long the request may take.
        read: reads the body; it gets the function that accounts for its bytes.
        bulk: interactive requests go first.
        is_there: the body has come, and counts: `read` hands it over, which is no stage.
        network: name of the one that runs its photos; None for the default one.

    Raises:
        UnknownNetwork: no network has this name.
        Unavailable: no backend is ready.
        Overloaded: there is no room, or the answer would be late; see `Gate.enter`.
        DeadlineExceeded: the body did not come in time.
    """
    served = service.networks.named(network)
    served.check_works()
    deadline = Deadline(stages.started, timeout_s)
    with served.kept(), service.gate.enter(deadline=deadline.at, bulk=bulk) as place:
        async with deadline.kept():
            body = await read(place.take)
        if not is_there:
            stages.end("read")
        request = _Request(service, served, place, hung_up, stages, deadline)
        try:
            yield Received(request, body)
        finally:
            request.close()
            if isinstance(body, Body):
                body.let_go()


class Work:
    """Photos that are being worked on. `Received.work` makes it, or `Many.work` for one of many."""

    def __init__(self, request: _Request, stages: Stages, body: Body) -> None:
        self.stages = stages
        self.service = request.service
        self.bulk = request.place.bulk
        self._request = request
        self._body = body

    async def segment(
        self,
        unpack: Callable[[bytes], bytes] = lambda data: data,
        *,
        bare: bool = False,
        frame: Callable[[], int | None] = lambda: None,
        network: Callable[[], str | None] = lambda: None,
    ) -> Segmentation:
        """The photo in the body → the lesion probability of its pixels.

        The body is let go once the photo is decoded.

        Args:
            unpack: takes the body's bytes, and returns the photo's or raises a problem; called in a
                thread.
            bare: the body is the photo itself; a lone small one is decoded on the event loop.
            frame: tells, once the body is unpacked, which frame of the photo is wanted.
            network: tells then which network the body names; None if it names none.

        Raises:
            Problem: whatever is wrong with the request or its photo.
            ClientGone: the client hung up between two stages.
        """
        try:
            async with contextlib.AsyncExitStack() as turn:
                await self._wait_for(turn)
                photo = await self._photo(unpack, turn, frame, bare=bare)
                await self._change_to(network(), turn)
                (inference,), backend = await self.infer([photo.pixels])
        finally:
            self._body.let_go()
        if self._request.is_gone():
            raise ClientGone
        return Segmentation(
            inference.probability,
            photo.width,
            photo.height,
            photo.orientation,
            inference.batch_size,
            backend,
            photo.pixels,
            photo.spacing,
            photo.frame,
        )

    async def _wait_for(self, turn: contextlib.AsyncExitStack) -> None:
        try:
            await turn.enter_async_context(self._request.network.turns[self.bulk].turn())
        except asyncio.CancelledError:
            # Where it is not the deadline, another photo of the request failed.
            is_late = self._request.deadline.left_s < _COARSE_S
            self.service.metrics.dropped.labels("deadline" if is_late else "abandoned").inc()
            raise
        self.stages.end("queue")

    async def _change_to(self, network: str | None, turn: contextlib.AsyncExitStack) -> None:
        """Let the network that the body names run the photo, at a turn of its own."""
        before = self._request.network
        self._request.choose(network)
        if self._request.network is not before:
            await turn.aclose()
            await self._wait_for(turn)

    async def _photo(
        self,
        unpack: Callable[[bytes], bytes],
        turn: contextlib.AsyncExitStack,
        frame: Callable[[], int | None],
        *,
        bare: bool,
    ) -> Photo:
        """The decoded photo. If that takes seconds `turn` is given back; errors: see `segment`."""
        body = self._body
        try:
            is_here = bare and not self.bulk and frame() is None
            photo = self._decode_here(body.data) if is_here else None
            if photo is None:
                photo = await self.service.threads.run(
                    self._decode, body, unpack, frame, bulk=self.bulk
                )
            if photo is None:
                await turn.aclose()
                photo = await self.service.threads.run(self._decode_slowly, body, frame, slow=True)
            if self._request.is_gone():
                raise ClientGone
        except ClientGone:
            self.service.metrics.dropped.labels("client_gone").inc()
            raise
        finally:
            body.let_go()
        self.stages.end("decode")
        return photo

    async def infer(
        self, images: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[Inference], BackendInfo]:
        """Run pixels through the network, and say which backend ran them; see `Served.infer`."""
        results, backend = await self._request.network.infer(
            images,
            deadline=self._request.deadline.at,
            is_gone=self._request.is_gone,
            bulk=self.bulk,
            pin=self._request.pin,
        )
        self.stages.end("queue", min(result.started for result in results))
        self.stages.end("infer", max(result.ended for result in results))
        return results, backend

    async def encode(
        self, make: Callable[[], Result], *, here: bool = False, slow: bool = False
    ) -> Result:
        """The answer that `make` returns, made in a thread, or `here` if that takes no longer.

        `slow` says that it may take seconds; see `is_slow`.

        Raises:
            Problem: the photo, which `make` reads once more, took too long or too much memory.
        """
        try:
            content = (
                make() if here else await self.service.threads.run(make, bulk=self.bulk, slow=slow)
            )
        except PhotoError as error:
            raise of_photo_error(error) from error
        self.stages.end("encode")
        return content

    def is_slow(self, photo: bytes, pixels: int) -> bool:
        """Whether it may take seconds to decode a photo of so many pixels."""
        return not self.bulk and pixels > _SLOW_PIXELS and not is_baseline_jpeg(photo)

    def _decode_here(self, data: bytes) -> Photo | None:
        """Decode a lone small photo on the event loop: changing threads takes a fifth of its time.

        None if it may take longer than a few milliseconds, or does not decode.
        """
        if self.service.gate.admitted != 1 or len(data) > _SMALL_BYTES:
            return None
        most = min(_SMALL_PIXELS, self.service.settings.max_pixels)
        try:
            return read_photo(data, max_pixels=most) if is_baseline_jpeg(data) else None
        except PhotoError:
            return None

    def _decode(
        self, body: Body, unpack: Callable[[bytes], bytes], frame: Callable[[], int | None]
    ) -> Photo | None:
        """The decoded photo; None if it may take seconds, and then `body` has its bytes again."""
        data = unpack(body.take())
        most = self.service.settings.max_pixels
        try:
            return self._read(data, most if self.bulk else min(most, _SLOW_PIXELS), frame())
        except TooLarge:
            if self.bulk or most <= _SLOW_PIXELS:
                raise
        # Checked only now, since it reads the whole file once more.
        if is_baseline_jpeg(data):
            return self._read(data, most, frame())
        body.put(data)
        return None

    def _decode_slowly(self, body: Body, frame: Callable[[], int | None]) -> Photo:
        return self._read(body.take(), self.service.settings.max_pixels, frame())

    def _read(self, data: bytes, max_pixels: int, frame: int | None) -> Photo:
        if self._request.is_gone():
            raise ClientGone
        try:
            room = self.service.pixels.room
            jpeg = self.service.jpeg
            return read_photo(data, max_pixels=max_pixels, room=room, frame=frame, jpeg=jpeg)
        except PhotoError as error:
            raise of_photo_error(error) from error
