"""The application: routes, and how an HTTP request becomes a call of the service."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server import VERSION
from server.backends import BackendError
from server.http.access import Access
from server.http.admin import admin_router
from server.http.answers import (
    MaskFormat,
    ModelAnswer,
    StatusAnswer,
    json_answer,
    model_answer,
    png_answer,
    probability_bytes,
)
from server.http.context import RequestContext
from server.http.openinference import openinference_router
from server.http.pages import page_router
from server.http.parameters import (
    Clean,
    MaskForm,
    MaskSize,
    Priority,
    Threshold,
    TimeoutMs,
    answer_type,
    deadline,
    is_bulk,
    is_original,
    only_known,
    with_fields,
)
from server.http.prefix import UnderPrefix
from server.http.problems import install
from server.http.reference import (
    DESCRIPTION,
    SEGMENT_BODY,
    SEGMENT_JSON_RESPONSES,
    SEGMENT_RESPONSES,
    problem_responses,
    router,
)
from server.http.segment_batch import bulk_router
from server.http.shedding import Shedding
from server.http.uploads import (
    Fields,
    check_type,
    hang_up,
    has_hung_up,
    image_in_body,
    is_form,
    read_body,
)
from server.inference.loading import Loader
from server.inference.service import Service
from server.keys import KeyFile
from server.observe.metrics import SHARED, Metrics
from server.observe.stages import Stages
from server.observe.tracing import open_tracing
from server.settings import Settings

__all__ = ["create_app"]

log = logging.getLogger("slsnet.server")

# All that are documented, and those by which a page's traces go on here (W3C Trace Context).
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
    "Retry-After",
    "Server-Timing",
    "WWW-Authenticate",
    "X-Request-ID",
]

PNG = "image/png"
JSON = "application/json"

# The last is the PNG too, for clients that take bytes under this name alone.
_FORMS = (PNG, JSON, "application/octet-stream")
_BY_FORMAT: dict[str | None, str] = {"png": PNG, "json": JSON}

_REFRESH_S = 1

_PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    settings: Settings,
    on_failure: Callable[[], None] = lambda: None,
    on_reloaded: Callable[[], None] = lambda: None,
) -> tuple[ASGIApp, Service]:
    """The ASGI application, and the service behind it.

    The network is loaded in the background from the application's start on; until then liveness
    answers 200 and readiness 503.

    Args:
        settings: all there is to set.
        on_failure: called if the network cannot be loaded.
        on_reloaded: called when an administrator has had it loaded again.

    Raises:
        KeyFileError: the file of API keys cannot be read.
        RuntimeError: traces are wanted and cannot be made.
    """
    tracing = open_tracing()
    keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
    metrics = Metrics()
    service = Service(settings, metrics)
    loader = Loader(service)

    async def load() -> None:
        try:
            await loader.load()
        except BackendError as error:
            log.error("%s", error)
            on_failure()
        except Exception:
            # Nobody else sees it, and readiness would say 503 for ever.
            log.exception("the network cannot be loaded")
            on_failure()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        loading = asyncio.create_task(load())
        refreshing = asyncio.create_task(_refresh(metrics)) if SHARED else None
        yield {"reload": loader.load}
        if refreshing is not None:
            refreshing.cancel()
        await asyncio.wait([loading])
        await loader.close()
        await service.close()
        if tracing is not None:
            # The last spans are worth two seconds; a collector that is away would take up to thirty
            # and, as the drain's time ends, the exit code 0 with them.
            sending = threading.Thread(target=tracing[1], name="traces", daemon=True)
            sending.start()
            await asyncio.to_thread(sending.join, 2)

    app = FastAPI(
        title="SLSNet Server",
        version=VERSION,
        summary="Skin lesion segmentation",
        description=DESCRIPTION,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        # Served by `server.http.reference`.
        openapi_url=None,
        # Relative to where the document is read from, whatever a proxy calls that.
        servers=[{"url": settings.root_path or "."}],
        # It would send the photo and the key again, and to an address without the proxy's TLS.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        lifespan=lifespan,
    )
    install(app)
    # The first ones, as each request is held against one route after the other.
    _add_routes(app, service, metrics)
    app.include_router(router)
    app.include_router(page_router)
    app.include_router(bulk_router(service))
    app.include_router(openinference_router(service, VERSION))
    app.include_router(admin_router(loader.load, on_reloaded))
    guarded: ASGIApp = Access(
        Shedding(app),
        keys,
        metrics_keyed=settings.metrics_keyed,
        requests_per_s=settings.key_requests_per_s / settings.workers,
        burst=settings.key_burst,
    )
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        # Outside: a browser asks what it may send without showing a key.
        guarded = CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_REQUEST_HEADERS,
            allow_private_network=settings.cors_private_network,
            expose_headers=_CORS_ANSWER_HEADERS,
        )
    context = RequestContext(
        guarded,
        metrics,
        lambda: service.draining,
        encrypted=settings.tls_cert is not None,
        shared=bool(origins),
        record=tracing and tracing[0],
    )
    if settings.root_path:
        return UnderPrefix(context, settings.root_path), service
    return context, service


class _BriefRoute(APIRoute):
    """A route all of whose parameters have defaults, called at once by requests that bring none.

    Most photos come so, and to find that out takes FastAPI as long as all else on the event loop.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        with_parameters = super().get_route_handler()
        headers = [field.alias for field in self.dependant.header_params]

        async def handle(request: Request) -> Response:
            if request.scope["query_string"] or any(name in request.headers for name in headers):
                return await with_parameters(request)
            response: Response = await self.endpoint(request)
            return response

        return handle


class _Answer(Response):
    """A mask, which may hold something until it is sent."""

    def __init__(self, content: bytes, media_type: str, held: contextlib.ExitStack) -> None:
        super().__init__(content, media_type=media_type, headers={"Vary": "Accept"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


def _operation_id(route: APIRoute) -> str:
    """Such as `health_ready`: generated clients name their functions so."""
    return "_".join(part for part in route.path.split("/") if part and not part.startswith("{"))


async def _refresh(metrics: Metrics) -> None:
    """Whichever process is asked shows the figures of all, so each keeps its own up to date."""
    while True:
        metrics.refresh()
        await asyncio.sleep(_REFRESH_S)


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    settings = service.settings

    # Generated clients know one form of an answer for each path. So what is described here is the
    # PNG, and JSON, which this path can give as well, at a path of its own.
    async def segment(
        request: Request,
        threshold: Threshold = 0.5,
        size: MaskSize = None,
        clean: Clean = False,
        answer_format: Annotated[
            Literal["png", "json"] | None, Query(alias="format", include_in_schema=False)
        ] = None,
        mask: Annotated[MaskFormat, Query(include_in_schema=False)] = MaskFormat.PNG,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        asked = {
            "threshold": threshold,
            "size": size,
            "clean": clean,
            "format": answer_format,
            "mask": mask,
        }
        return await answer(request, asked, _FORMS, x_request_timeout_ms, priority)

    async def segment_json(
        request: Request,
        threshold: Threshold = 0.5,
        size: MaskSize = None,
        clean: Clean = False,
        mask: MaskForm = MaskFormat.PNG,
        x_request_timeout_ms: TimeoutMs = None,
        priority: Priority = "",
    ) -> Response:
        asked = {"threshold": threshold, "size": size, "clean": clean, "mask": mask}
        return await answer(request, asked, (JSON,), x_request_timeout_ms, priority)

    async def answer(
        request: Request,
        asked: dict[str, Any],
        forms: tuple[str, ...],
        timeout_ms: float | None,
        priority: str,
    ) -> Response:
        stages: Stages = request.state.stages
        timeout_s = settings.timeout_s(timeout_ms)
        bulk = is_bulk(priority)
        content_type = request.headers.get("content-type", "")
        check_type(request.headers)

        def media_type() -> str:
            return answer_type(
                request.headers, forms, asked["mask"], _BY_FORMAT.get(asked.get("format"))
            )

        def take_fields(fields: Fields) -> None:
            asked.update(with_fields(request, asked, fields))
            media_type()

        if not is_form(content_type):
            # Of a form only its fields say what is asked for.
            media_type()
        async with deadline(timeout_s):
            with (
                service.admission(deadline=stages.started + timeout_s, bulk=bulk) as place,
                contextlib.ExitStack() as held,
            ):
                body = [
                    await read_body(
                        request.receive,
                        request.headers,
                        max_bytes=settings.max_body_bytes,
                        take=place.take,
                    )
                ]
                stages.end("read")
                place.check()
                place.begin()
                # Taken out, so that nobody holds the body for longer than its bytes count.
                held.callback(body.clear)
                with hang_up(request.receive) as gone:
                    segmentation = await service.segment(
                        lambda: image_in_body(body.pop(), content_type, take_fields),
                        bare=() if is_form(content_type) else body,
                        stages=stages,
                        deadline=stages.started + timeout_s,
                        is_gone=lambda: has_hung_up(gone),
                        bulk=bulk,
                    )
                stages.notes["batch"] = str(segmentation.batch_size)
                threshold, mask, clean = asked["threshold"], asked["mask"], asked["clean"]
                original = is_original(asked["size"], mask)
                kind = media_type()
                if kind == JSON:
                    size_bytes = probability_bytes(segmentation, original, mask)
                    held.enter_context(service.gate.answer_bytes(size_bytes, bulk=bulk))
                    content = await service.threads.run(
                        lambda: json_answer(
                            segmentation,
                            threshold,
                            original,
                            mask,
                            clean=clean,
                            request_id=request.state.request_id,
                            timings_ms=stages.milliseconds(),
                            room=service.pixels.room,
                        ),
                        bulk=bulk,
                    )
                elif segmentation.is_small and not clean and not bulk:
                    content = png_answer(segmentation, threshold, original, clean=clean)
                else:
                    content = await service.threads.run(
                        lambda: png_answer(segmentation, threshold, original, clean=clean),
                        bulk=bulk,
                    )
                stages.end("encode")
                place.end(served=True)
                return _Answer(content, kind, held.pop_all())

    for path, endpoint, summary, responses in (
        ("/segment", segment, "Segment the lesion in a photo", SEGMENT_RESPONSES),
        ("/segment/json", segment_json, "The same, with figures, as JSON", SEGMENT_JSON_RESPONSES),
    ):
        app.router.add_api_route(
            path,
            endpoint,
            methods=["POST"],
            tags=["segmentation"],
            summary=summary,
            dependencies=[Depends(only_known)],
            response_class=Response,
            responses=responses,
            openapi_extra=SEGMENT_BODY,
            route_class_override=_BriefRoute,
        )

    @app.get("/health/live", tags=["health"], summary="Whether the process works")
    async def live() -> StatusAnswer:
        return StatusAnswer(status="live")

    @app.get(
        "/health/ready",
        tags=["health"],
        summary="Whether to send requests here",
        responses=problem_responses(503),
    )
    async def ready() -> StatusAnswer:
        service.check_ready()
        return StatusAnswer(status="ready", backend=service.backend.name)

    @app.get(
        "/model",
        tags=["model"],
        summary="The model card",
        responses=problem_responses(503),
    )
    async def model() -> ModelAnswer:
        return model_answer(service.backend)

    @app.get(
        "/metrics",
        tags=["health"],
        summary="Figures for Prometheus",
        response_class=Response,
        responses={
            200: {
                "content": {
                    "text/plain": {
                        "schema": {"type": "string"},
                        "example": "# HELP slsnet_requests_in_flight Segmentation requests being"
                        " worked on or waiting\n# TYPE slsnet_requests_in_flight gauge\n"
                        "slsnet_requests_in_flight 3.0\n",
                    }
                }
            }
        },
    )
    async def prometheus() -> Response:
        return Response(metrics.render(), headers={"Content-Type": _PROMETHEUS_TEXT})
