"""The ASGI application: its routes, and the layers around them."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from server import VERSION
from server.backends import BackendError
from server.http.access import Access
from server.http.admin import admin_router
from server.http.context import RequestContext
from server.http.device import DeviceFiles, device_router
from server.http.health import health_router
from server.http.openinference.repository import repository_router
from server.http.openinference.route import openinference_router
from server.http.pages import page_router
from server.http.prefix import UnderPrefix
from server.http.problems import install
from server.http.reference import DESCRIPTION, router
from server.http.segment.batch import batch_router
from server.http.segment.route import add_segment
from server.http.shedding import Shedding
from server.http.stream.route import stream_router
from server.inference.repository import Repository
from server.inference.service import Service
from server.inference.sharing.feeder import Address, Link
from server.keys import KeyFile
from server.observe.metrics import SHARED, Metrics
from server.observe.tracing import Record, open_tracing
from server.settings import Settings

__all__ = ["create_app"]

log = logging.getLogger("slsnet.server")

# The documented headers, and those that continue a page's traces (W3C Trace Context).
_CORS_REQUEST_HEADERS = [
    "Authorization",
    "Baggage",
    "Content-Encoding",
    "Content-Type",
    "Inference-Header-Content-Length",
    "Priority",
    "Traceparent",
    "Tracestate",
    "X-API-Key",
    "X-Request-ID",
    "X-Request-Timeout-Ms",
]

_CORS_ANSWER_HEADERS = [
    "Accept-Encoding",
    "Allow",
    "Inference-Header-Content-Length",
    "Mask-Quality",
    "Photo-Fitness",
    "Retry-After",
    "Server-Timing",
    "WWW-Authenticate",
    "X-Request-ID",
]


def create_app(
    settings: Settings,
    on_failure: Callable[[], None] = lambda: None,
    on_reloaded: Callable[[], None] = lambda: None,
    owner: Address | None = None,
    *,
    is_alone: bool = True,
) -> tuple[ASGIApp, Service]:
    """The ASGI application, and the service behind it.

    The network is loaded in the background from the application's start on; until then liveness
    answers 200 and readiness 503.

    Args:
        settings: the server's settings.
        on_failure: called if the network cannot be loaded.
        on_reloaded: called when an administrator has reloaded the network.
        owner: the process that runs the network; None for this one.
        is_alone: whether no other process serves beside it; else networks are neither loaded by
            name nor retired.

    Raises:
        KeyFileError: the file of API keys cannot be read.
        DeviceFilesError: the files for browsers are not whole.
        GpuJpegError: photos are to be decoded on the GPU, and cannot be.
        RuntimeError: traces are switched on and cannot be made.
    """
    tracing = open_tracing()
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    device = DeviceFiles(settings.device_dir) if settings.device_dir else None
    service = Service(settings, Metrics())
    if settings.decode == "gpu":
        # Here, since it takes CUDA's libraries, which few servers have.
        from server.inference.decoding import GpuDecoding

        service.jpeg = GpuDecoding(service.metrics)
    is_alone = is_alone and settings.workers == 1
    loader = Repository(service, is_alone=is_alone) if owner is None else Link(service, owner)
    app = _framework(
        settings, partial(_lifespan, service, loader, on_failure, tracing and tracing[1])
    )
    # First, since a request is compared with one after the other.
    add_segment(app.router, service)
    for routes in (
        health_router(service),
        router,
        page_router(offers_device=device is not None),
        device_router(device),
        batch_router(service),
        stream_router(service, VERSION),
        openinference_router(service, VERSION),
        repository_router(service, loader),
        admin_router(service, loader.reload, on_reloaded),
    ):
        app.include_router(routes)
    guarded, shared = _guarded(app, settings, keys)
    return _in_context(guarded, service, shared, tracing and tracing[0]), service


def _framework(settings: Settings, lifespan: Callable[[FastAPI], Any]) -> FastAPI:
    """The framework, without routes."""
    app = FastAPI(
        title="SLSNet Server",
        version=VERSION,
        summary="Skin lesion segmentation",
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        # `server.http.reference` serves them.
        openapi_url=None,
        # Relative to the document's own address, so that it holds behind any proxy.
        servers=[{"url": settings.root_path or "."}],
        # A redirect would send photo and key again, to an address without the proxy's TLS.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        # Traces, metrics and logs are the server's own (`server.observe`), and each exists once.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=lifespan,
    )
    install(app)
    return app


@contextlib.asynccontextmanager
async def _lifespan(
    service: Service,
    loader: Repository | Link,
    on_failure: Callable[[], None],
    end_traces: Callable[[], None] | None,
    _: FastAPI,
) -> AsyncIterator[dict[str, Any]]:
    loading = asyncio.create_task(_load(loader, on_failure))
    refreshing = asyncio.create_task(service.metrics.keep_fresh()) if SHARED else None
    yield {"reload": loader.reload}
    if refreshing is not None:
        refreshing.cancel()
    await asyncio.wait([loading])
    await loader.close()
    await service.close()
    if end_traces is not None:
        # Wait two seconds for the last spans. An absent collector would take up to thirty, and
        # could exceed the drain's time, so that the exit code would not be 0.
        sending = threading.Thread(target=end_traces, name="traces", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, 2)


async def _load(loader: Repository | Link, on_failure: Callable[[], None]) -> None:
    try:
        await loader.start()
    except BackendError as error:
        log.error("%s", error)
        on_failure()
    except Exception:
        # Nobody else sees this error, and readiness would stay 503 for ever.
        log.exception("the network cannot be loaded")
        on_failure()


def _guarded(app: ASGIApp, settings: Settings, keys: KeyFile | None) -> tuple[ASGIApp, bool]:
    """The layers around the framework: keys, refusals and CORS."""
    origins = settings.origins
    guarded: ASGIApp = Access(
        Shedding(app),
        keys,
        metrics_keyed=settings.metrics_keyed,
        requests_per_s=settings.key_requests_per_s / settings.workers,
        burst=settings.key_burst,
        origins=origins,
    )
    if origins:
        # The outermost: a browser asks what it may send before it shows a key.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_REQUEST_HEADERS,
            allow_private_network=settings.cors_private_network,
            expose_headers=_CORS_ANSWER_HEADERS,
        )
    return guarded, bool(origins)


def _in_context(app: ASGIApp, service: Service, shared: bool, record: Record | None) -> ASGIApp:
    """The outermost layers: ids, headers, log and metrics of each request, and the path prefix."""
    settings = service.settings
    context = RequestContext(
        app,
        service.metrics,
        lambda: service.drain.begun,
        encrypted=settings.tls_cert is not None,
        shared=shared,
        record=record,
    )
    return UnderPrefix(context, settings.root_path) if settings.root_path else context


def _operation_id(route: APIRoute) -> str:
    """The name of the function in generated clients, such as `health_ready`."""
    return "_".join(part for part in route.path.split("/") if part and not part.startswith("{"))
