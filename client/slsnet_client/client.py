"""The client, for asyncio and without it. It keeps no photo and writes none.

Repeating a request is hand-written, in a dozen lines: tenacity and httpx-retries know neither the
deadline that all attempts share nor that the server is told what is left of it.
"""

import asyncio
import concurrent.futures
import contextlib
import random
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ssl import SSLContext
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx

from slsnet_client.errors import (
    DeadlinePassed,
    ServerBusy,
    ServerFailed,
    SlsnetError,
    Unreachable,
    error_of,
)
from slsnet_client.photos import Photo, photo_bytes
from slsnet_client.result import Network, Result, network_of, result_of
from slsnet_client.stream import Streamed, streamed
from slsnet_client.version import VERSION

__all__ = ["AsyncClient", "Client", "Form", "Outcome"]

_T = TypeVar("_T")

Form = Literal[
    "png", "overlay", "overlay-png", "probability8", "probability16", "npy", "svg", "coco"
]
"""Files that the server makes of what it finds."""

# Seconds before the first repetition, unless the server asks for more; each next waits twice as
# long, up to the second figure.
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0

# What the server is told has to be finite. A day is more than it waits for anything.
_LONGEST_DEADLINE_S = 86_400.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """One photo of many: it has either `result` or `error`."""

    index: int
    """Of the photo among those given, from 0."""
    result: Result | None
    error: SlsnetError | OSError | TypeError | ValueError | None


class AsyncClient:
    """Asks an SLSNet Server, within asyncio.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        api_key: if the server has keys.
        deadline_s: seconds for a photo, all repetitions included. The server is told what is left.
        retries: how often a photo is sent again, or a stream opened, where the server is full or
            cannot be reached. To segment changes nothing in the server, so it is safe to repeat.
        verify: how its certificate is checked, as in httpx.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 30,
        retries: int = 4,
        verify: SSLContext | bool = True,
    ) -> None:
        headers = {"User-Agent": f"slsnet-client/{VERSION}"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._url, self._headers, self._verify = url, headers, verify
        self._deadline_s = deadline_s
        self._retries = retries
        # How long it may take is up to the deadline alone, and how many at once to the caller.
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=None,
            verify=verify,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def segment(
        self,
        photo: Photo,
        *,
        threshold: float = 0.5,
        clean: bool = False,
        model: str | None = None,
        reject_unfit: bool = False,
        probability: bool = False,
        features: bool = False,
        bulk: bool = False,
        deadline_s: float | None = None,
    ) -> Result:
        """Segment one photo.

        Args:
            photo: a path, a file's bytes, an array of pixels, or Pillow's image.
            threshold: lesion is where the probability is above it.
            clean: whether to leave only the largest region, without its holes.
            model: name of the network, of those that the server has; its default one if None.
            reject_unfit: whether a picture that is likely no dermoscopic photo is refused, and not
                only told of in the result's `fitness`.
            probability: whether to fetch probabilities too, 2.7 bytes for each pixel of the photo.
                They are rounded to 16 bits, so pixels at the very threshold may differ.
            features: whether to fetch measurements of shape and colours, which are no diagnosis.
            bulk: whether to let interactive requests go first.
            deadline_s: instead of the client's.

        Raises:
            SlsnetError: the server refused, failed, was not reached, or took too long.
            OSError, TypeError, ValueError: the photo cannot be read here.
        """
        query = _query(threshold, clean=clean, model=model, reject_unfit=reject_unfit)
        query["mask"] = "probabilities" if probability else "png"
        if features:
            query["features"] = "true"
        return await self._post("/segment/json", query, photo, _read_result, bulk, deadline_s)

    async def segment_as(
        self,
        photo: Photo,
        form: Form,
        *,
        threshold: float = 0.5,
        clean: bool = False,
        model: str | None = None,
        reject_unfit: bool = False,
        bulk: bool = False,
        deadline_s: float | None = None,
    ) -> bytes:
        """Segment one photo into a file of another form; arguments and errors as for `segment`.

        Args:
            form: `overlay` (JPEG), `overlay-png`, `probability8` or `probability16` (greyscale
                PNG), `npy`, `svg`, `coco` (JSON), or the mask as `png`.
        """
        query = _query(threshold, clean=clean, model=model, reject_unfit=reject_unfit) | {
            "format": form
        }
        return await self._post("/segment", query, photo, _read_bytes, bulk, deadline_s)

    async def segment_json(
        self,
        photo: Photo,
        mask: str = "rle",
        *,
        threshold: float = 0.5,
        clean: bool = False,
        model: str | None = None,
        reject_unfit: bool = False,
        bulk: bool = False,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """The server's JSON as it is; arguments and errors as for `segment`.

        Args:
            mask: how it holds the mask: `png`, `rle`, `polygons`, or another that the server knows.
        """
        query = _query(threshold, clean=clean, model=model, reject_unfit=reject_unfit) | {
            "mask": mask
        }
        return await self._post("/segment/json", query, photo, _read_json, bulk, deadline_s)

    async def network(self, model: str | None = None) -> Network:
        """A network that the server runs: the default one, or the one of this name.

        Raises:
            SlsnetError: the server was not reached, or refused.
        """
        try:
            query = {} if model is None else {"model": model}
            answer = await self._http.get("/model", params=query, timeout=self._deadline_s)
        except httpx.RequestError as lost:
            raise _unreachable(lost) from lost
        if answer.status_code != 200:
            raise _error_in(answer)
        try:
            return network_of(answer.json())
        except (KeyError, TypeError, ValueError) as error:
            raise _of_another_kind(answer) from error

    async def _post(
        self,
        path: str,
        query: dict[str, str],
        photo: Photo,
        read: Callable[[httpx.Response], _T],
        bulk: bool,
        deadline_s: float | None,
    ) -> _T:
        wanted_s = self._deadline_s if deadline_s is None else deadline_s
        ends = time.monotonic() + min(wanted_s, _LONGEST_DEADLINE_S)
        # The same for every repetition, so that the server's log shows them together.
        headers = {"Content-Type": "image/jpeg", "X-Request-ID": uuid.uuid4().hex}
        if bulk:
            headers["Priority"] = "bulk"
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                content = await asyncio.to_thread(photo_bytes, photo)
                answer = await self._ask(path, query, headers, content, ends)
                return await asyncio.to_thread(read, answer)
        except TimeoutError:
            raise DeadlinePassed(
                "No answer came before the deadline.", request_id=headers["X-Request-ID"]
            ) from None

    async def _ask(
        self,
        path: str,
        query: dict[str, str],
        headers: dict[str, str],
        content: bytes,
        ends: float,
    ) -> httpx.Response:
        for repeated in range(self._retries + 1):
            left_ms = max(1.0, 1000 * (ends - time.monotonic()))
            headers["X-Request-Timeout-Ms"] = f"{left_ms:.0f}"
            try:
                answer = await self._http.post(path, params=query, headers=headers, content=content)
            except httpx.RequestError as lost:
                error: SlsnetError = _unreachable(lost, headers["X-Request-ID"])
                again = isinstance(lost, httpx.NetworkError | httpx.RemoteProtocolError)
            else:
                if answer.status_code == 200:
                    return answer
                error = _error_in(answer)
                again = isinstance(error, ServerBusy)
            pause_s = _pause_s(repeated, error)
            # Where the pause ends after the deadline, the caller knows at once.
            if not again or repeated == self._retries or time.monotonic() + pause_s >= ends:
                raise error
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def segment_many(
        self,
        photos: Iterable[Photo],
        *,
        concurrency: int = 4,
        ordered: bool = True,
        **options: Any,
    ) -> AsyncIterator[Outcome]:
        """Segment many photos; what is wrong with one is in its own outcome only.

        Args:
            photos: taken one by one, as there is room.
            concurrency: photos at work at the same time, at most.
            ordered: whether outcomes come in the photos' order; otherwise as they get done.
            options: those of `segment`; `bulk` is on unless they say otherwise. The deadline is
                each photo's own.
        """
        _check_concurrency(concurrency)
        waiting = enumerate(photos)
        tasks: deque[asyncio.Task[Outcome]] = deque()
        try:
            while True:
                while len(tasks) < concurrency and (item := next(waiting, None)):
                    tasks.append(asyncio.create_task(self._outcome(*item, options)))
                if not tasks:
                    return
                if not ordered:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    tasks = deque(sorted(tasks, key=lambda task: task not in done))
                outcome = await tasks[0]
                tasks.popleft()
                yield outcome
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _outcome(self, index: int, photo: Photo, options: dict[str, Any]) -> Outcome:
        try:
            return Outcome(index, await self.segment(photo, **{"bulk": True, **options}), None)
        except (SlsnetError, OSError, TypeError, ValueError) as error:
            return Outcome(index, None, error)

    async def stream(
        self,
        frames: Iterable[Photo] | AsyncIterable[Photo],
        *,
        threshold: float = 0.5,
        clean: bool = False,
        model: str | None = None,
        reject_unfit: bool = False,
        deadline_s: float = 2,
        in_flight: int = 2,
    ) -> AsyncGenerator[Streamed, None]:
        """Segment the frames of a camera, over one WebSocket.

        The next frame is taken from `frames` once there is room for it, so a source that gives its
        latest picture when it is asked keeps the latency low. A stream that is lost, or that the
        server ends because it stops or is full, is opened again, as often as `retries` says without
        an answer in between; frames that were unanswered then are dropped. It ends with its source.

        Args:
            frames: photos as for `segment`.
            threshold, clean, model, reject_unfit: as for `segment`.
            deadline_s: seconds within which a frame's mask is of use.
            in_flight: frames that are unanswered at the same time, at most. With two, one is on its
                way while the other is worked on.

        Raises:
            SlsnetError: the server refused the stream, ended it, or was not reached. What is wrong
                with one frame is in its own answer only.
            OSError, TypeError, ValueError: a frame cannot be read here.
            ImportError: the package websockets is missing.
        """
        if in_flight < 1:
            raise ValueError(f"At least 1 frame is in flight, not {in_flight}.")
        query = {
            **_query(threshold, clean=clean, model=model, reject_unfit=reject_unfit),
            "deadline_ms": f"{1000 * min(deadline_s, _LONGEST_DEADLINE_S):g}",
        }
        address = httpx.URL(self._url)
        secure = address.scheme == "https"
        address = address.copy_with(
            scheme="wss" if secure else "ws", path=f"{address.path.rstrip('/')}/stream"
        )
        tls = _tls(self._verify) if secure else None

        def pause_s(repeated: int, error: SlsnetError) -> float | None:
            return _pause_s(repeated, error) if repeated < self._retries else None

        async with contextlib.aclosing(
            streamed(
                str(address),
                frames,
                headers=self._headers,
                tls=tls,
                query=query,
                in_flight=in_flight,
                pause_s=pause_s,
            )
        ) as answers:
            async for answer in answers:
                yield answer

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Client:
    """Asks an SLSNet Server, without asyncio; arguments are those of `AsyncClient`.

    It may be used by many threads. The requests run in a thread of its own, since only there can a
    deadline end them wherever they are.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._client = AsyncClient(url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="slsnet-client", daemon=True
        )
        self._thread.start()

    def segment(self, photo: Photo, **options: Any) -> Result:
        """Segment one photo; as `AsyncClient.segment`."""
        return self._result(self._start(self._client.segment(photo, **options)))

    def segment_as(self, photo: Photo, form: Form, **options: Any) -> bytes:
        """Segment one photo into a file of another form; as `AsyncClient.segment_as`."""
        return self._result(self._start(self._client.segment_as(photo, form, **options)))

    def segment_json(self, photo: Photo, mask: str = "rle", **options: Any) -> dict[str, Any]:
        """The server's JSON as it is; as `AsyncClient.segment_json`."""
        return self._result(self._start(self._client.segment_json(photo, mask, **options)))

    def network(self, model: str | None = None) -> Network:
        """A network that the server runs; as `AsyncClient.network`."""
        return self._result(self._start(self._client.network(model)))

    def segment_many(
        self,
        photos: Iterable[Photo],
        *,
        concurrency: int = 4,
        ordered: bool = True,
        **options: Any,
    ) -> Iterator[Outcome]:
        """Segment many photos; as `AsyncClient.segment_many`."""
        _check_concurrency(concurrency)
        waiting = enumerate(photos)
        futures: deque[concurrent.futures.Future[Outcome]] = deque()
        try:
            while True:
                while len(futures) < concurrency and (item := next(waiting, None)):
                    futures.append(self._start(self._client._outcome(*item, options)))
                if not futures:
                    return
                if not ordered:
                    done, _ = concurrent.futures.wait(
                        futures, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    futures = deque(sorted(futures, key=lambda future: future not in done))
                outcome = futures[0].result()
                futures.popleft()
                yield outcome
        finally:
            for future in futures:
                future.cancel()

    def stream(
        self, frames: Iterable[Photo] | AsyncIterable[Photo], **options: Any
    ) -> Iterator[Streamed]:
        """Segment the frames of a camera; as `AsyncClient.stream`."""
        answers = self._client.stream(frames, **options)

        async def take() -> Streamed | None:
            return await anext(answers, None)

        async def end() -> None:
            await answers.aclose()

        try:
            while (answer := self._result(self._start(take()))) is not None:
                yield answer
        finally:
            self._result(self._start(end()))

    def _start(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _result(self, future: concurrent.futures.Future[_T]) -> _T:
        try:
            return future.result()
        finally:
            # Interrupted by the keyboard, the request ends too.
            future.cancel()

    def close(self) -> None:
        """Close the connections, and end the thread."""
        if not self._loop.is_closed():
            self._result(self._start(self._client.aclose()))
            self._result(self._start(self._loop.shutdown_default_executor()))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _tls(verify: SSLContext | bool) -> SSLContext:
    if isinstance(verify, SSLContext):
        return verify
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"The concurrency is 1 or more, not {concurrency}.")


def _query(
    threshold: float, *, clean: bool, model: str | None, reject_unfit: bool
) -> dict[str, str]:
    query = {"threshold": str(threshold), "clean": str(clean).lower(), "size": "original"}
    # Servers of an earlier version do not know these.
    if model is not None:
        query["model"] = model
    if reject_unfit:
        query["reject_unfit"] = "true"
    return query


def _pause_s(repeated: int, error: SlsnetError) -> float:
    """Seconds before a repetition: longer each time, and no less than the server asks for."""
    grown = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0**repeated) * random.uniform(0.5, 1)
    return max(grown, error.retry_after_s or 0)


def _read_bytes(answer: httpx.Response) -> bytes:
    return answer.content


def _read_json(answer: httpx.Response) -> dict[str, Any]:
    try:
        document = answer.json()
        if not isinstance(document, dict):
            raise TypeError
    except (TypeError, ValueError) as error:
        raise _of_another_kind(answer) from error
    return document


def _read_result(answer: httpx.Response) -> Result:
    try:
        return result_of(answer.json())
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise _of_another_kind(answer) from error


def _unreachable(lost: httpx.RequestError, request_id: str | None = None) -> Unreachable:
    return Unreachable(
        f"The server was not reached: {str(lost) or type(lost).__name__}.", request_id=request_id
    )


def _of_another_kind(answer: httpx.Response) -> ServerFailed:
    return ServerFailed(
        "This is no answer of an SLSNet Server: is the address right?",
        status=answer.status_code,
        request_id=answer.headers.get("X-Request-ID"),
    )


def _error_in(answer: httpx.Response) -> SlsnetError:
    try:
        document = answer.json()
    except ValueError:
        document = None
    headers = answer.headers
    return error_of(
        answer.status_code, document, headers.get("X-Request-ID"), _retry_after_s(headers)
    )


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Seconds, from either form that HTTP allows."""
    said = headers.get("Retry-After", "")
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
