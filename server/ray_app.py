"""The service on Ray Serve: `serve run server.ray_app:app`, with settings as arguments.

There are two deployments. Each replica of `Segmenter` is the whole application, with its batching
and its limits. The `Gateway` in front reads a whole request before it hands it on, so that it can
hand it on again: when a replica dies, Ray answers its requests with 500, and segmenting again does
no harm.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import get_runtime_context, serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import Message, Scope
from uvicorn.lifespan.on import LifespanOn

from server.backends import BackendError
from server.http.admitted import admitted
from server.http.app import create_app
from server.http.problems import answer
from server.observe.logs import configure
from server.settings import Settings

__all__ = ["Gateway", "Segmenter", "app"]

log = logging.getLogger("slsnet.ray")

# A photo that kills its decoder must not go through all replicas.
_ATTEMPTS = 3

# Requests beside those that Serve counts as at work here: health, metrics, pages.
_OTHER_REQUESTS = 32

_RAYS_OWN = {"host", "port", "workers", "share_network", "tls_cert", "tls_key", "tls_client_ca"}

# Bytes that a form may add to its photos.
_FORM_BYTES = 2**20

_POLL_S = 0.05

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers, body."""


class Segmenter:
    """One replica: `server.http.app`'s application, called without HTTP."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start with the network loaded and warmed up.

        Raises:
            BackendError: it cannot be loaded.
        """
        resources: dict[str, float] = get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        cpus = max(1, int(resources.get("CPU", 1)))
        # The process sees all cores of the machine, but other replicas share them.
        settings = settings.model_copy(
            update={
                "threads": settings.threads or cpus,
                "decode_threads": settings.decode_threads or cpus,
            }
        )
        configure(settings.log_level, settings.log_format)
        failed = asyncio.Event()
        self._app, self._service = create_app(settings, failed.set, is_alone=False)
        config = uvicorn.Config(self._app, lifespan="on", log_config=None)
        config.load()
        self._lifespan = LifespanOn(config)
        await self._lifespan.startup()
        while not self._service.is_server_ready:
            if failed.is_set() or self._lifespan.should_exit:
                raise BackendError("The network cannot be loaded, the log says why.")
            await asyncio.sleep(_POLL_S)

    async def answer(self, scope: dict[str, Any], body: bytes) -> Answer:
        """The application's answer to a request; `scope` is ASGI's, without its `state`."""
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                # If the client hangs up, this call is cancelled.
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": body}

        start: Message = {}
        content: list[bytes] = []

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                content.append(message.get("body", b""))

        state = dict(self._lifespan.state)
        full: Scope = {"type": "http", "asgi": {"version": "3.0"}, "state": state, **scope}
        await self._app(full, receive, send)
        return start["status"], list(start["headers"]), b"".join(content)

    async def signed_answer(self, scope: dict[str, Any], body: bytes) -> tuple[str, Answer]:
        """The answer with the replica's name, when all replicas are asked."""
        name: str = serve.get_replica_context().replica_id.unique_id
        return name, await self.answer(scope, body)

    async def check_health(self) -> None:
        """Tell Serve whether to replace this replica.

        Raises:
            Unavailable: the network fails on everything.
        """
        self._service.networks.default.check_works()

    async def __del__(self) -> None:
        """End: Serve has waited for accepted requests, and sends no more."""
        self._service.drain.begin()
        await self._lifespan.shutdown()


def _full(request: Request, why: str) -> Response:
    headers = {"Retry-After": "1", "Connection": "close"}
    return answer(request, HTTPStatus.TOO_MANY_REQUESTS, f"{why} Try again later.", headers)


def _plain(scope: Scope) -> dict[str, Any]:
    """The part of a request's scope that can travel to another process."""
    names = ("http_version", "method", "scheme", "query_string", "headers", "client", "server")
    path = scope["path"]
    return {
        **{name: scope[name] for name in names},
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
    }


def _together(texts: dict[str, str]) -> bytes:
    """Metrics of several replicas as one text, with a label that names the replica."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                known.add_sample(sample.name, labels, sample.value)
    return generate_latest(_Families(families.values()))


class _Families(CollectorRegistry):
    """A registry of metrics that were collected elsewhere."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


# All that the gateway uses is above: Serve copies it at the decorator.
_web = FastAPI(openapi_url=None)


@serve.ingress(_web)
class Gateway:
    """Reads requests and hands them to replicas, and to another one if a replica dies."""

    def __init__(self, segmenters: DeploymentHandle[Segmenter], settings: Settings) -> None:
        self._segmenters = segmenters
        self._most_bytes = settings.max_body_bytes + _FORM_BYTES
        self._most_bytes_of_many = settings.bulk_max_bytes + _FORM_BYTES
        self._bytes_in_flight = 0
        self._max_bytes_in_flight = settings.max_bytes_in_flight
        longest_ms = max(settings.request_timeout_ms, settings.bulk_timeout_ms)
        self._timeout_s = longest_ms / 1000 + settings.request_timeout_ms / 1000

    @_web.api_route(
        "/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    )
    async def forward(self, request: Request) -> Response:
        """Hand the request to a replica, and return its answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._forward(request)
        except (TimeoutError, DeploymentUnavailableError):
            return answer(
                request,
                HTTPStatus.SERVICE_UNAVAILABLE,
                "No replica is there to answer. Try again later.",
                {"Retry-After": "10"},
            )
        except (ObjectStoreFullError, OutOfDiskError):
            # It broke on the way to a replica, or back.
            return _full(request, "Ray's object store has no room for this request.")
        except RayActorError:
            return answer(
                request,
                HTTPStatus.INTERNAL_SERVER_ERROR,
                f"{_ATTEMPTS} replicas died at work on this request, which may be its own doing.",
            )

    async def _forward(self, request: Request) -> Response:
        route = admitted(request.url.path)
        many = route is not None and route.many
        most_bytes = self._most_bytes_of_many if many else self._most_bytes
        with contextlib.ExitStack() as held:
            body = bytearray()
            # A body whose header says that it is too large is not read: the replica refuses it by
            # that header, and says how many bytes are allowed.
            if int(request.headers.get("content-length", "0")) <= most_bytes:
                async for chunk in request.stream():
                    if self._bytes_in_flight + len(chunk) > self._max_bytes_in_flight:
                        return _full(request, "The server holds as many bytes as it may.")
                    self._bytes_in_flight += len(chunk)
                    held.callback(self._let_go, len(chunk))
                    body += chunk
                    if len(body) > most_bytes:
                        break
            status, headers, content = await self._ask(_plain(request.scope), bytes(body))
        response = Response(content, status)
        # Serve's proxy adds the request's id, which it made and the replica took over.
        own = (b"content-length", b"x-request-id")
        response.raw_headers = [pair for pair in headers if pair[0] not in own]
        response.raw_headers.append((b"content-length", str(len(content)).encode()))
        return response

    def _let_go(self, size: int) -> None:
        self._bytes_in_flight -= size

    async def _ask(self, scope: dict[str, Any], body: bytes) -> Answer:
        if scope["path"] in ("/metrics", "/admin/reload"):
            answers = await self._segmenters.broadcast("signed_answer", scope, body).results_async()
            none: Answer = (HTTPStatus.SERVICE_UNAVAILABLE, [(b"retry-after", b"10")], b"")
            # The answer of one that failed is given for all.
            worst = max((found for _, found in answers), key=lambda found: found[0], default=none)
            if scope["path"] == "/metrics" and worst[0] == HTTPStatus.OK:
                texts = {name: content.decode() for name, (_, _, content) in answers}
                return worst[0], worst[1], _together(texts)
            return worst
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found: Answer = await self._segmenters.answer.remote(scope, body)
                return found
            except RayActorError as error:
                log.warning("a replica died at work, attempt %d: %s", attempt, type(error).__name__)
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")


def app(args: dict[str, Any]) -> serve.Application:
    """Build what `serve run server.ray_app:app` and configuration files deploy.

    Args:
        args: settings by name, such as `max_pixels=20000000`; those of the environment count too.

    Raises:
        ValueError: a value is out of range, or Ray takes care of that setting.
    """
    settings = Settings(**args)
    # Variables for these, which containers set for the server without Ray, are ignored.
    if given := _RAYS_OWN & args.keys():
        raise ValueError(
            f"{', '.join(sorted(given))}: set this where Ray Serve has it (docs/ray.md), as it is"
            " Ray that listens and starts processes."
        )
    segmenters = serve.deployment(
        max_ongoing_requests=settings.max_queue + _OTHER_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 8,
            "target_ongoing_requests": 8,
        },
        ray_actor_options={"num_cpus": 1},
    )(Segmenter).bind(settings)
    return serve.deployment(
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        ray_actor_options={"num_cpus": 0.5},
    )(Gateway).bind(segmenters, settings)
