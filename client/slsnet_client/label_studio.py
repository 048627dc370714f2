r"""Label Studio's ML backend: the server's masks as predictions that annotators correct.

    pip install "./client[label-studio]"
    LABEL_STUDIO_API_KEY=… python -m slsnet_client.label_studio --server http://127.0.0.1:8000 \
        --label-studio https://labels.example

It is a small web server of its own, which Label Studio asks (Settings, Model, Connect Model) and
which asks SLSNet Server. It keeps no photo. A labelling interface needs BrushLabels or
PolygonLabels; RectangleLabels and KeyPointLabels with `smart="true"` are prompts.
"""

import argparse
import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import os
import sys
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as missing:
    raise ImportError(
        f"{missing}: the ML backend is an extra: pip install 'slsnet-client[label-studio]'"
    ) from missing

from slsnet_client.client import AsyncClient
from slsnet_client.errors import SlsnetError
from slsnet_client.fetching import Fetcher, FetchError, origin
from slsnet_client.prompts import Box, Crop, Drawn, around, drawn

__all__ = ["Backend", "brush_rle", "create_app", "main"]

log = logging.getLogger("slsnet.label_studio")

# Seconds for the tasks of a request that is under way when the process is told to stop.
_LAST_ANSWERS_S = 60

# Tasks come by the hundred, each with its data.
_MAX_BODY = 16 << 20

# Photos of one request that are fetched and segmented at the same time.
_AT_WORK = 4

# Widths of the four lengths that a run may be written with; see `brush_rle`.
_LENGTH_BITS = (3, 6, 10, 16)

_WORD_BITS = 8

# Label Studio's own access tokens live for five minutes.
_ACCESS_S = 120


class BadConfig(Exception):
    """The project's labelling interface has no place for a mask; the message says what to add."""


@dataclass(frozen=True)
class Control:
    """Where masks go in a project's labelling interface."""

    kind: str
    """`brushlabels` or `polygonlabels`."""
    from_name: str
    to_name: str
    """The name of the image's tag."""
    labels: tuple[str, ...]
    data_key: str
    """The member of a task's data that has the photo's address."""

    @classmethod
    def of(cls, config: str) -> "Control":
        """Read a labelling interface, as XML.

        Raises:
            BadConfig: it has no place for a mask.
        """
        if "<!" in config.replace("<!--", ""):
            raise BadConfig("The labelling interface has a document type, which none needs.")
        try:
            root = ET.fromstring(config)
        except ET.ParseError as error:
            raise BadConfig(f"The labelling interface is no XML: {error}.") from error
        images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
        for kind in ("BrushLabels", "PolygonLabels"):
            for tag in root.iter(kind):
                labels = tuple(label.get("value", "") for label in tag.iter("Label"))
                key = images.get(tag.get("toName"), "")
                if labels and key.startswith("$"):
                    names = tag.get("name", ""), tag.get("toName", "")
                    return cls(kind.lower(), *names, labels, key[1:])
        raise BadConfig(
            "The labelling interface needs BrushLabels or PolygonLabels of an Image whose value is"
            " a variable, such as $image."
        )

    def label(self, prompted: Sequence[str]) -> str:
        """The label for a lesion: the one that the annotator's prompt has, one called so, or the
        first.
        """
        called = [label for label in self.labels if label.lower() == "lesion"]
        return next(label for label in (*prompted, *called, *self.labels) if label in self.labels)


@dataclass(frozen=True)
class Prompts:
    """What an annotator pointed at; in percent of the photo's width and height."""

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """x, y, width, height."""
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: Any) -> "Prompts":
        """Read a request's context; what is no prompt is passed over."""
        boxes: list[tuple[float, float, float, float]] = []
        points: list[tuple[float, float]] = []
        labels: list[str] = []
        results = context.get("result") if isinstance(context, dict) else None
        for result in results if isinstance(results, list) else []:
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                value = result["value"]
                if result["type"] in ("rectanglelabels", "rectangle"):
                    x, y, across, down = map(
                        float, map(value.__getitem__, ("x", "y", "width", "height"))
                    )
                    boxes.append((x, y, across, down))
                elif result["type"] in ("keypointlabels", "keypoint"):
                    # A point of what is not meant tells nothing of where the lesion is.
                    if str(result.get("is_positive", 1)) in ("0", "False"):
                        continue
                    points.append((float(value["x"]), float(value["y"])))
                labels += [str(label) for label in value.get(result["type"], ())]
        return cls(tuple(boxes), tuple(points), tuple(labels))

    @property
    def crop(self) -> Crop | None:
        """Chooses the part of the photo; None without a prompt."""
        if not (self.boxes or self.points):
            return None

        def part(width: int, height: int) -> Box | None:
            h, v = width / 100, height / 100
            boxes = [(x * h, y * v, across * h, down * v) for x, y, across, down in self.boxes]
            points = [(x * h, y * v) for x, y in self.points]
            return around(boxes, points, width, height)

        return part


class Backend:
    """Makes predictions for tasks.

    Args:
        client: asks SLSNet Server.
        fetcher: fetches photos, from Label Studio too.
        label_studio: its address, which a task's own addresses are relative to.
        threshold, clean: as for `AsyncClient.segment`.
    """

    def __init__(
        self,
        client: AsyncClient,
        fetcher: Fetcher,
        label_studio: str,
        *,
        threshold: float = 0.5,
        clean: bool = False,
    ) -> None:
        self._client = client
        self._fetcher = fetcher
        self._label_studio = httpx.URL(label_studio.rstrip("/") + "/")
        self._threshold = threshold
        self._clean = clean
        self._at_work = asyncio.Semaphore(_AT_WORK)

    async def version(self) -> str:
        """The name of what answers, as predictions have it."""
        return _version((await self._client.network()).version)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._fetcher.aclose()
        await self._client.aclose()

    async def predict(
        self, tasks: Sequence[Any], control: Control, prompts: Prompts
    ) -> list[dict[str, Any]]:
        """A prediction for each task, in their order; what is wrong with one is in its own."""
        return await asyncio.gather(*(self._predict(task, control, prompts) for task in tasks))

    async def _predict(self, task: Any, control: Control, prompts: Prompts) -> dict[str, Any]:
        number = task.get("id") if isinstance(task, dict) else None
        try:
            async with self._at_work:
                photo = await self._photo(task, control.data_key)
                found = await drawn(
                    self._client,
                    photo,
                    prompts.crop,
                    outlines=control.kind == "polygonlabels",
                    threshold=self._threshold,
                    clean=self._clean,
                )
                results = await asyncio.to_thread(_results, found, control, prompts.labels)
        except (FetchError, SlsnetError, ValueError) as error:
            log.warning("task %s has no prediction: %s", number, error)
            return {"result": [], "score": 0.0, "error": str(error)}
        return {"result": results, "score": found.score, "model_version": _version(found.version)}

    async def _photo(self, task: Any, key: str) -> bytes:
        data = task.get("data") if isinstance(task, dict) else None
        address = data.get(key) if isinstance(data, dict) else None
        if not isinstance(address, str) or not address:
            raise ValueError(f"The task's data have no address under {key!r}.")
        if address.startswith("data:"):
            head, _, content = address.partition(",")
            if not head.endswith(";base64"):
                raise ValueError("A photo within the task is in base64.")
            try:
                return base64.b64decode(content, validate=True)
            except binascii.Error as error:
                raise ValueError("The photo within the task is no base64.") from error
        if "://" not in address:
            address = str(self._label_studio.join(address))
        return await self._fetcher.fetch(address)


def _version(network: str) -> str:
    return f"slsnet {network}"


def _results(found: Drawn, control: Control, prompted: Sequence[str]) -> list[dict[str, Any]]:
    """The regions of a prediction, in Label Studio's own form."""
    label = control.label(prompted)
    values: list[dict[str, Any]] = []
    if control.kind == "brushlabels":
        if found.mask is not None and found.mask.any():
            values.append({"format": "rle", "rle": brush_rle(found.mask)})
    else:
        # It knows no holes.
        for outer, *_ in found.outlines:
            points = [[100 * x / found.width, 100 * y / found.height] for x, y in outer]
            values.append({"points": points, "closed": True})
    return [
        {
            "id": uuid.uuid4().hex[:10],
            "from_name": control.from_name,
            "to_name": control.to_name,
            "type": control.kind,
            "original_width": found.width,
            "original_height": found.height,
            "image_rotation": 0,
            "score": found.score,
            "value": {**value, control.kind: [label]},
        }
        for value in values
    ]


def brush_rle(mask: NDArray[np.bool_]) -> list[int]:
    """A mask as Label Studio's brush holds it: bytes of a bit stream (thi.ng/rle-pack).

    32 bits say how many values there are: four a pixel, red, green, blue and alpha, row by row.
    Five say how wide a value is, less one, and four times four how wide the length of a run may be,
    less one. A run is a bit that is 1, two that choose the length's width, the length less one, and
    its value. It is hand-written since `label_studio_sdk` brings pandas, OpenCV and more.

    Args:
        mask: [height, width].
    """
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff([0, *edges.tolist(), flat.size]) * 4
    bits = [f"{flat.size * 4:032b}{_WORD_BITS - 1:05b}"]
    bits += [f"{width - 1:04b}" for width in _LENGTH_BITS]
    white = bool(flat[0])
    for length in lengths.tolist():
        value = f"{255 if white else 0:0{_WORD_BITS}b}"
        while length:
            part = min(length, 1 << _LENGTH_BITS[-1])
            which = next(i for i, width in enumerate(_LENGTH_BITS) if part <= 1 << width)
            bits.append(f"1{which:02b}{part - 1:0{_LENGTH_BITS[which]}b}{value}")
            length -= part
        white = not white
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


_Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""Makes the JSON of an answer of that of a request."""


def _guarded(user: str, answer: _Answer) -> Callable[[Request], Awaitable[Response]]:
    expected = "Basic " + base64.b64encode(user.encode()).decode()

    async def handle(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if user and not hmac.compare_digest(shown.encode(), expected.encode()):
            raise HTTPException(401, "Name or password is wrong.", {"WWW-Authenticate": "Basic"})
        body = await _body(request) if request.method == "POST" else {}
        return JSONResponse(await answer(body))

    return handle


def create_app(backend: Backend, *, user: str = "") -> Starlette:
    """The web server that Label Studio asks.

    Args:
        backend: makes predictions.
        user: name and password that Label Studio has to show (HTTP Basic), as `name:password`;
            empty for none.
    """
    guarded = partial(_guarded, user)

    async def health(_: dict[str, Any]) -> dict[str, Any]:
        return {"status": "UP", "model_class": "SLSNet"}

    async def setup(body: dict[str, Any]) -> dict[str, Any]:
        # Says at once what the first prediction would.
        Control.of(str(body.get("schema", "")))
        return {"model_version": await backend.version()}

    async def versions(_: dict[str, Any]) -> dict[str, Any]:
        return {"versions": [await backend.version()]}

    async def predict(body: dict[str, Any]) -> dict[str, Any]:
        tasks = body.get("tasks")
        if not isinstance(tasks, list):
            raise HTTPException(422, "The request has no list of tasks.")
        params = body.get("params")
        context = params.get("context") if isinstance(params, dict) else None
        control = Control.of(str(body.get("label_config", "")))
        results = await backend.predict(tasks, control, Prompts.of(context))
        if results and all("error" in result for result in results):
            raise HTTPException(502, str(results[0]["error"]))
        return {"results": results}

    async def nothing(_: dict[str, Any]) -> dict[str, Any]:
        """Training, and the webhooks that would start it: the network is not trained here."""
        return {}

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await backend.aclose()

    get, post = (["GET"], ["POST"])
    return Starlette(
        routes=[
            Route("/", guarded(health), methods=get),
            Route("/health", guarded(health), methods=get),
            Route("/setup", guarded(setup), methods=post),
            Route("/versions", guarded(versions), methods=get),
            Route("/predict", guarded(predict), methods=post),
            Route("/train", guarded(nothing), methods=post),
            Route("/webhook", guarded(nothing), methods=post),
        ],
        exception_handlers={
            HTTPException: _refused,
            BadConfig: _refused,
            SlsnetError: _refused,
        },
        lifespan=lifespan,
    )


async def _body(request: Request) -> dict[str, Any]:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= _MAX_BODY:
            chunks.append(chunk)
        else:
            # Read to its end, so that the sender reads the answer.
            chunks.clear()
    if size > _MAX_BODY:
        raise HTTPException(413, f"The request has more than {_MAX_BODY} bytes.")
    try:
        body = json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The request is no JSON.") from error
    if not isinstance(body, dict):
        raise HTTPException(422, "The request is no JSON object.")
    return body


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, error.headers
    else:
        status, headers = (422 if isinstance(error, BadConfig) else 502), None
        detail = str(error)
    return JSONResponse({"error": detail}, status, headers)


class LabelStudioKey:
    """What is shown to Label Studio, to fetch the photos that it holds.

    Args:
        address: of Label Studio.
        key: an API key: a personal access token, or a legacy token.
    """

    def __init__(self, address: str, key: str) -> None:
        self._refresh = httpx.URL(address.rstrip("/") + "/").join("api/token/refresh")
        self._key = key
        self._access = ""
        self._until = 0.0

    async def headers(self) -> dict[str, str]:
        """The header that shows it.

        Raises:
            FetchError: Label Studio gives no access for the token.
        """
        # A personal access token is a JWT, in three parts.
        if self._key.count(".") != 2:
            return {"Authorization": f"Token {self._key}"}
        if time.monotonic() > self._until:
            try:
                async with httpx.AsyncClient(trust_env=False) as http:
                    answer = await http.post(self._refresh, json={"refresh": self._key})
                self._access = answer.raise_for_status().json()["access"]
            except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
                raise FetchError(f"Label Studio does not take the API key: {error}") from error
            self._until = time.monotonic() + _ACCESS_S
        return {"Authorization": f"Bearer {self._access}"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slsnet_client.label_studio",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the image's health check reads options too
        epilog="Environment: LABEL_STUDIO_API_KEY, to fetch photos that Label Studio holds;\n"
        "SLSNET_API_KEY, if SLSNet Server has keys; ML_BACKEND_USER=name:password, which Label\n"
        "Studio then has to show.",
    )
    parser.add_argument("--server", required=True, metavar="URL", help="SLSNet Server's address")
    parser.add_argument(
        "--label-studio",
        required=True,
        metavar="URL",
        help="Label Studio's address; photos come from there",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="another host that photos may come from; may be repeated",
    )
    parser.add_argument(
        "--allow-private",
        action="store_true",
        help="let these hosts have private addresses, such as 10.0.0.7 or 127.0.0.1",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="probability above which a pixel is lesion, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--clean", action="store_true", help="leave the largest region only")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=9090, help="port to listen on (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # It writes the address of every request, in which there may be a key.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        source = origin(given.label_studio)
    except FetchError as error:
        parser.error(f"--label-studio: {error}")
    key = os.environ.get("LABEL_STUDIO_API_KEY", "")
    fetcher = Fetcher(
        [f"{source[1]}:{source[2]}", *given.allow_host],
        private=given.allow_private,
        headers={source: LabelStudioKey(given.label_studio, key).headers} if key else {},
    )
    client = AsyncClient(given.server, api_key=os.environ.get("SLSNET_API_KEY"))
    backend = Backend(
        client, fetcher, given.label_studio, threshold=given.threshold, clean=given.clean
    )
    app = create_app(backend, user=os.environ.get("ML_BACKEND_USER", ""))
    uvicorn.run(
        app,
        host=given.host,
        port=given.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
