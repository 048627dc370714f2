"""One stream: frames come, the newest is segmented, its mask goes out.

A task reads frames and keeps the newest; another works on one at a time. So a stream has one photo
in the server's queue at most, beside those of other streams and of HTTP, whatever its client sends.
A frame that a newer one replaces before its turn is dropped, and each message says how many were.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from starlette.websockets import WebSocket

from server.http.access import SPEND
from server.http.errors import BadRequest, HttpProblem, TooManyRequests
from server.http.problems import error_message, told
from server.http.segment.masks import encoded
from server.http.stream.wishes import Wishes
from server.inference.errors import ClientGone, Problem, UnknownNetwork
from server.inference.service import Service
from server.inference.submission import Body, submitted
from server.observe.stages import Stages

__all__ = ["Idle", "Session"]

log = logging.getLogger("slsnet.server")

DROPPED = "dropped"

# Seconds from a refusal until the next frame is tried: a full server is not asked again at once,
# and meanwhile a newer frame takes the place of an older one.
_PAUSE_S = 0.1


class Idle(HttpProblem):
    """No frame came for as long as a connection may be idle."""

    status = HTTPStatus.REQUEST_TIMEOUT
    reason = "idle"


@dataclass
class _Frame:
    """A frame that waits, or is worked on."""

    number: int
    body: Body
    size: int
    """Bytes that it takes from the budget."""
    stages: Stages
    problem: Problem | None = None
    """Why it is not worked on."""


class Session:
    """A stream, from its first frame to its end."""

    def __init__(self, service: Service, websocket: WebSocket, wishes: Wishes) -> None:
        self._service = service
        self._websocket = websocket
        self._wishes = wishes
        self._asked = wishes.asked(websocket.state.request_id)
        self._spend = getattr(websocket.state, SPEND, lambda: None)
        self._newest: _Frame | None = None
        self._came = asyncio.Event()
        self._gone = asyncio.Event()
        self._is_last = False
        self._frames = 0
        self.dropped = 0
        """Frames that a newer one took the place of."""
        self._tokens = float(service.settings.stream_frames_per_s)
        self._counted = time.perf_counter()

    async def run(self) -> None:
        """Serve until the client leaves, or the server drains and the frame at work is answered.

        Raises:
            Problem: why the server ends the stream.
            WebSocketDisconnect: the client left while it was sent something.
        """
        body_bytes = self._service.gate.body_bytes
        with body_bytes.account(_memory_full) as self._take:
            tasks = reading, working = (
                asyncio.create_task(self._read()),
                asyncio.create_task(self._work()),
            )
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if reading.done() and not self._gone.is_set():
                    await reading
                    self._is_last = True
                    self._came.set()
                if not self._gone.is_set():
                    await working
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                notes: dict[str, str] = self._websocket.state.stages.notes
                notes |= {"frames": str(self._frames), DROPPED: str(self.dropped)}

    async def _read(self) -> None:
        """Take frames until the client leaves, or the server drains."""
        idle_s = self._service.settings.keep_alive_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await self._websocket.receive()
            except TimeoutError:
                raise Idle(
                    f"No frame came for {idle_s} s. Open another stream when there are frames."
                ) from None
            if message["type"] == "websocket.disconnect":
                if not self._service.drain.begun:
                    self._gone.set()
                return
            data = message.get("bytes")
            if data is None:
                raise BadRequest("A frame is a binary message, and this one is text.")
            self._take_frame(data)
            # If there is no work, this frame begins, also where the next one came with it.
            await asyncio.sleep(0)

    def _take_frame(self, data: bytes) -> None:
        now, most = time.perf_counter(), self._service.settings.stream_frames_per_s
        self._tokens = min(most, self._tokens + (now - self._counted) * most)
        self._counted = now
        if self._tokens < 1:
            raise TooManyRequests(
                f"A stream may send {most} frames a second: send the next one once this one is"
                " answered.",
                1,
                "too_many_frames",
            )
        self._tokens -= 1
        self._frames += 1
        if self._newest is not None:
            self._let_go(self._newest)
            self.dropped += 1
            self._service.metrics.stream_frames.labels(DROPPED).inc()
        frame = _Frame(self._frames, Body(data), len(data), Stages(now))
        try:
            self._take(frame.size)
        except TooManyRequests as problem:
            frame.problem = problem.with_traceback(None)
            frame.size = 0
            frame.body.let_go()
        self._newest = frame
        self._came.set()

    def _let_go(self, frame: _Frame) -> None:
        frame.body.let_go()
        self._take(-frame.size)

    async def _work(self) -> None:
        """Answer the newest frame, then what is the newest by then."""
        while not self._is_last:
            await self._came.wait()
            self._came.clear()
            frame, self._newest = self._newest, None
            if frame is None:
                continue
            status = await self._answer(frame)
            self._service.metrics.stream_frames.labels(str(int(status))).inc()
            if self._service.drain.begun:
                return
            if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
                await asyncio.sleep(_PAUSE_S)

    async def _answer(self, frame: _Frame) -> int:
        """Segment a frame and send its mask, or what is wrong with it; return its status."""
        status = HTTPStatus.OK
        try:
            try:
                message = await self._masked(frame)
            finally:
                self._let_go(frame)
        except (ClientGone, UnknownNetwork):
            # A network that was retired meanwhile does not come back for the next frame.
            raise
        except Exception as error:
            if isinstance(error, Problem):
                problem = error
            else:
                request_id = self._websocket.state.request_id
                log.exception("request %s failed on frame %d", request_id, frame.number)
                problem = Problem("The server failed on this frame.")
            status = told(problem).status
            message = error_message(
                self._websocket, problem, frame=frame.number, dropped=self.dropped
            )
            # Its traceback has this frame: the two would keep each other, and the photo.
            del problem
        await self._websocket.send_text(message)
        if status in (HTTPStatus.OK, HTTPStatus.GATEWAY_TIMEOUT):
            whole_s = time.perf_counter() - frame.stages.started
            self._service.metrics.request_seconds.labels("/stream").observe(whole_s)
        return status

    async def _masked(self, frame: _Frame) -> str:
        """The message with a frame's mask."""
        if frame.problem is not None:
            raise frame.problem
        self._spend()
        wishes, stages, service = self._wishes, frame.stages, self._service
        timeout_s = service.settings.timeout_s(wishes.deadline_ms)

        async def read(_: Callable[[int], None]) -> Body:
            return frame.body

        with contextlib.ExitStack() as held:
            async with (
                submitted(
                    service,
                    self._gone.wait,
                    stages,
                    timeout_s,
                    read,
                    is_there=True,
                    network=wishes.model,
                ) as received,
                received.work() as work,
            ):
                bare = wishes.frames == "photo"
                segmentation = await work.segment(wishes.photo_of, bare=bare)
                # A mask of a stream is not drawn over its frame.
                answer = await encoded(work, segmentation, self._asked, Body(b""), held)
        for stage, seconds in stages.seconds.items():
            service.metrics.stage_seconds.labels(stage).observe(seconds)
        head = {
            "type": "mask",
            "frame": frame.number,
            "dropped": self.dropped,
            "total_ms": round((time.perf_counter() - stages.started) * 1000, 3),
        }
        # The mask's own answer is JSON already.
        return f'{json.dumps(head).removesuffix("}")}, "result": {answer.content.decode("ascii")}}}'


def _memory_full() -> TooManyRequests:
    return TooManyRequests(
        "The server is busy: the photos in flight fill the memory set aside for them.", 1, "memory"
    )
