"""What serves first, and what takes over: ONNX Runtime at once, TensorRT once it is built."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from server.backends import Backend, BackendError, open_backend
from server.backends.engine_cache import EngineCache, EngineEvent, open_engine_cache
from server.service import Service
from server.settings import Settings, available_cores

__all__ = ["bring_up"]

log = logging.getLogger("slsnet.loading")


async def bring_up(service: Service, stop: threading.Event) -> None:
    """Let the best backend that is there serve, and a better one take over when it is.

    Returns when nothing better is to come, or soon after `stop` is set.

    Raises:
        BackendError: nothing can serve, or TensorRT was asked for and cannot be used here.
    """
    settings = service.settings

    def count(event: EngineEvent) -> None:
        service.metrics.engine_events.labels(event=event).inc()

    engines = await service.in_thread(lambda: _engines(settings, count))
    backend = await service.in_thread(engines.load) if engines is not None else None
    if backend is not None:
        await service.use(backend)
        return
    await service.use(await service.in_thread(lambda: _first(settings)))
    if engines is None:
        return
    # Not in the pool of workers: it blocks for as long as a build takes.
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        engine = await asyncio.get_running_loop().run_in_executor(thread, engines.obtain, stop)
    if engine is None:
        return
    try:
        await service.use(engine)
    except BackendError as error:
        log.error("the engine does not take over: %s", error)


def _first(settings: Settings) -> Backend:
    threads = settings.threads or available_cores()
    return open_backend(settings.backend, settings.model, threads=threads)


def _engines(settings: Settings, count: Callable[[EngineEvent], None]) -> EngineCache | None:
    """The engine cache; None where TensorRT is not wanted, or cannot be used and need not be."""
    if settings.backend not in ("auto", "tensorrt"):
        return None
    try:
        folder = settings.engine_dir.expanduser()
        return open_engine_cache(folder, settings.model, settings.precision, count)
    except BackendError as error:
        if settings.backend == "tensorrt":
            raise
        log.info("no TensorRT: %s", error)
        return None
