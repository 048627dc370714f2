"""A request from its admission to its answer: one object owns its body, deadline and place.

    with submitted(service, hung_up, stages, timeout_s) as submission:   a place, or a refusal
        body = Body(await submission.receive(read))                      bytes that count
        async with submission.work() as work:                            checked once more, begun
            segmentation = await work.segment(body)                      decode, queue, network
            content = await work.encode(...)
                                                                         over, served or not

Only `work` reaches the network, and only after the steps before it. Decoding and masks run in a
pool of threads, inference in the batcher's threads. The event loop itself makes only small masks,
and decodes a lone small photo. If the client hangs up, its work is dropped before the next stage.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from photos.image import ImageError as PhotoError
from photos.image import Photo, is_baseline_jpeg, read_photo
from server.backends import BackendInfo
from server.inference.admission import Place
from server.inference.batching import Inference
from server.inference.deadline import Deadline
from server.inference.errors import ClientGone, TooLarge, of_photo_error
from server.inference.service import Service
from server.observe.stages import Stages

__all__ = ["Body", "Segmentation", "Submission", "Work", "submitted"]

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

# The largest photo that is decoded on the event loop, when it is alone.
_SMALL_PIXELS = 2**19
_SMALL_BYTES = 2**17

# Larger photos have threads of their own, except for a JPEG of one scan, which decodes scaled down.
_SLOW_PIXELS = 2**24

# The event loop may be so early with what it was to do at a time.
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


class Submission:
    """A request that has a place. `submitted` makes it."""

    def __init__(
        self,
        service: Service,
        place: Place,
        hung_up: Callable[[], Awaitable[object]],
        stages: Stages,
        deadline: Deadline,
    ) -> None:
        self.service = service
        self.stages = stages
        self.deadline = deadline
        self._place = place
        self._hung_up = hung_up
        self._gone: asyncio.Future[object] | None = None
        self._held = contextlib.ExitStack()

    async def receive(self, read: Callable[[Callable[[int], None]], Awaitable[Result]]) -> Result:
        """Read the body; `read` gets the function that accounts for its bytes.

        Raises:
            DeadlineExceeded: it did not come in time.
        """
        async with self.deadline.kept():
            received = await read(self._place.take)
        self.stages.end("read")
        return received

    async def parse(
        self,
        body: Body,
        parse: Callable[[Body, *Arguments], Result],
        *arguments: *Arguments,
        alone: bool = False,
    ) -> Result:
        """Parse a body in a thread; `alone` is that of `Threads.run`.

        Raises:
            DeadlineExceeded: it took too long.
        """
        try:
            async with self.deadline.kept():
                parsed = await self.service.threads.run(parse, body, *arguments, alone=alone)
        finally:
            body.let_go()
        self.stages.end("decode")
        return parsed

    def change(self, *, timeout_us: int | None, bulk: bool) -> None:
        """Apply what the body says of the request, before any work begins.

        Args:
            timeout_us: microseconds from its start; a longer time changes nothing.
            bulk: interactive requests go first.
        """
        if timeout_us is not None:
            self.deadline.shorten(timeout_us)
        self._place.deadline = self.deadline.at
        self._place.bulk |= bulk

    @property
    def bulk(self) -> bool:
        """Whether interactive requests go first."""
        return self._place.bulk

    def check(self, photos: int, *, places: int = 1) -> None:
        """Check again, now that the body is there, and watch from now on whether the client leaves.

        Args:
            photos: how many are to be worked on.
            places: how many they take.

        Raises:
            Overloaded: they would be done too late, or there is no room for them.
        """
        self._held.enter_context(self.service.gate.places(places - 1, bulk=self.bulk))
        self._place.check(photos)
        self._gone = asyncio.ensure_future(self._hung_up())

    @property
    def gone(self) -> asyncio.Future[object]:
        """A task that ends when the client hangs up; it exists once the body is there."""
        assert self._gone is not None
        return self._gone

    def is_gone(self) -> bool:
        """Whether the client hung up."""
        return self.gone.done() and not self.gone.cancelled()

    def give_back(self, body_bytes: int) -> None:
        """Free so many bytes of the body before its end."""
        self._place.take(-body_bytes)

    @contextlib.asynccontextmanager
    async def work(
        self, photos: int = 1, *, places: int = 1, stages: Stages | None = None
    ) -> AsyncIterator["Work"]:
        """Work on so many photos, until the deadline passes.

        Args:
            photos, places: as for `check`, which is called here unless it was before.
            stages: the stopwatch of these photos; None for the request's.

        Raises:
            Overloaded: see `check`.
            DeadlineExceeded: it took too long.
        """
        if self._gone is None:
            self.check(photos, places=places)
        self._place.begin(photos)
        served = False
        try:
            async with self.deadline.kept():
                yield Work(self, stages or self.stages)
            served = True
        finally:
            self._place.end(photos, served=served)

    def close(self) -> None:
        """Stop watching the client, and give the place back."""
        if self._gone is not None:
            self._gone.cancel()
        self._held.close()


@contextlib.contextmanager
def submitted(
    service: Service,
    hung_up: Callable[[], Awaitable[object]],
    stages: Stages,
    timeout_s: float,
    *,
    bulk: bool = False,
) -> Iterator[Submission]:
    """Admit a request: it has a place until the end of the block.

    Args:
        service: works on it.
        hung_up: waits until the client hangs up; called once the body is there.
        stages: the stopwatch, which began with the request.
        timeout_s: how long the request may take.
        bulk: interactive requests go first.

    Raises:
        Unavailable: no backend is ready.
        Overloaded: there is no room, or the answer would be late; see `Gate.enter`.
    """
    service.networks.check_works()
    deadline = Deadline(stages.started, timeout_s)
    with service.gate.enter(deadline=deadline.at, bulk=bulk) as place:
        submission = Submission(service, place, hung_up, stages, deadline)
        try:
            yield submission
        finally:
            submission.close()


class Work:
    """Photos of a submission that are being worked on. `Submission.work` makes it."""

    def __init__(self, submission: Submission, stages: Stages) -> None:
        self.stages = stages
        self.service = submission.service
        self.bulk = submission.bulk
        self._submission = submission

    async def segment(
        self,
        body: Body,
        unpack: Callable[[bytes], bytes] = lambda data: data,
        *,
        bare: bool = False,
        network: str | None = None,
    ) -> Segmentation:
        """A photo → the lesion probability of its pixels.

        Args:
            body: holds the photo; it is let go once the photo is decoded.
            unpack: returns the photo's bytes or raises a problem; called in a thread.
            bare: the body is the photo itself; a lone small one is decoded on the event loop.
            network: the one that `Networks.pinned` gave; None for the one in use.

        Raises:
            Problem: whatever is wrong with the request or its photo.
            ClientGone: the client hung up between two stages.
        """
        try:
            async with contextlib.AsyncExitStack() as turn:
                await self._wait_for(turn)
                photo = await self._photo(body, unpack, turn, bare=bare)
                (inference,), backend = await self.infer([photo.pixels], network=network)
        finally:
            body.let_go()
        if self._submission.is_gone():
            raise ClientGone
        return Segmentation(
            inference.probability,
            photo.width,
            photo.height,
            photo.orientation,
            inference.batch_size,
            backend,
        )

    async def _wait_for(self, turn: contextlib.AsyncExitStack) -> None:
        try:
            await turn.enter_async_context(self.service.turns[self.bulk].turn())
        except asyncio.CancelledError:
            # Where it is not the deadline, another photo of the request failed.
            is_late = self._submission.deadline.left_s < _COARSE_S
            self.service.metrics.dropped.labels("deadline" if is_late else "abandoned").inc()
            raise
        self.stages.end("queue")

    async def _photo(
        self,
        body: Body,
        unpack: Callable[[bytes], bytes],
        turn: contextlib.AsyncExitStack,
        *,
        bare: bool,
    ) -> Photo:
        """The decoded photo. If that takes seconds `turn` is given back; errors: see `segment`."""
        try:
            photo = self._decode_here(body.data) if bare and not self.bulk else None
            if photo is None:
                photo = await self.service.threads.run(self._decode, body, unpack, bulk=self.bulk)
            if photo is None:
                await turn.aclose()
                photo = await self.service.threads.run(self._decode_slowly, body, slow=True)
            if self._submission.is_gone():
                raise ClientGone
        except ClientGone:
            self.service.metrics.dropped.labels("client_gone").inc()
            raise
        finally:
            body.let_go()
        self.stages.end("decode")
        return photo

    async def infer(
        self, images: Sequence[NDArray[np.uint8]], *, network: str | None = None
    ) -> tuple[list[Inference], BackendInfo]:
        """Run pixels through the network, and say which backend ran them; see `Networks.infer`."""
        results, backend = await self.service.networks.infer(
            images,
            deadline=self._submission.deadline.at,
            is_gone=self._submission.is_gone,
            bulk=self.bulk,
            network=network,
        )
        self.stages.end("queue", min(result.started for result in results))
        self.stages.end("infer", max(result.ended for result in results))
        return results, backend

    async def encode(self, make: Callable[[], Result], *, here: bool = False) -> Result:
        """The answer that `make` returns, made in a thread, or `here` if that takes no longer."""
        content = make() if here else await self.service.threads.run(make, bulk=self.bulk)
        self.stages.end("encode")
        return content

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

    def _decode(self, body: Body, unpack: Callable[[bytes], bytes]) -> Photo | None:
        """The decoded photo; None if it may take seconds, and then `body` has its bytes again."""
        data = unpack(body.take())
        most = self.service.settings.max_pixels
        try:
            return self._read(data, most if self.bulk else min(most, _SLOW_PIXELS))
        except TooLarge:
            if self.bulk or most <= _SLOW_PIXELS:
                raise
        # Checked only now, since it reads the whole file once more.
        if is_baseline_jpeg(data):
            return self._read(data, most)
        body.put(data)
        return None

    def _decode_slowly(self, body: Body) -> Photo:
        return self._read(body.take(), self.service.settings.max_pixels)

    def _read(self, data: bytes, max_pixels: int) -> Photo:
        if self._submission.is_gone():
            raise ClientGone
        try:
            return read_photo(data, max_pixels=max_pixels, room=self.service.pixels.room)
        except PhotoError as error:
            raise of_photo_error(error) from error
