"""What serves first, and what takes over: ONNX Runtime at once, TensorRT once it is built."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from server.backends import Backend, BackendError, open_backend
from server.backends.engine_cache import EngineCache, EngineEvent, open_engine_cache
from server.backends.onnxruntime import OnnxRuntimeBackend
from server.service import Service
from server.settings import Settings, available_cores

__all__ = ["bring_up"]

log = logging.getLogger("slsnet.loading")


# A batch that failed and its retry can be one photo's fault; after this many in a row the GPU is
# lost.
_FAILURES = 5


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
    engine = await service.in_thread(engines.load) if engines is not None else None
    if engine is not None and await _take_over(service, engine, count):
        return
    await service.use(await service.in_thread(lambda: _first(settings)))
    if engines is None or engine is not None:
        return
    # Not in the pool of workers: it blocks for as long as a build takes.
    with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
        engine = await asyncio.get_running_loop().run_in_executor(thread, engines.obtain, stop)
    if engine is not None:
        await _take_over(service, engine, count)


async def _take_over(
    service: Service, engine: Backend, count: Callable[[EngineEvent], None]
) -> bool:
    """Let `engine` serve, and the CPU in its place should the GPU be lost."""
    loop = asyncio.get_running_loop()
    replacing: list[asyncio.Task[None]] = []

    async def replace() -> None:
        count("lost")
        log.error("engine lost: %d batches failed in a row; the CPU serves now", _FAILURES)
        try:
            await service.use(await service.in_thread(lambda: _on_cpu(service.settings)))
        except BackendError as error:
            log.error("%s", error)

    def lost() -> None:
        loop.call_soon_threadsafe(lambda: replacing.append(loop.create_task(replace())))

    try:
        await service.use(_Watched(engine, lost))
    except BackendError as error:
        count("load_failed")
        log.error("the engine does not take over: %s", error)
        return False
    return True


class _Watched:
    """A backend that tells once when too many of its batches have failed in a row."""

    def __init__(self, backend: Backend, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._backend = backend
        self._failures = 0
        self._lock = threading.Lock()
        self.describe = backend.describe
        self.warm_up = backend.warm_up
        self.close = backend.close

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            result = self._backend.infer(batch)
        except BackendError:
            with self._lock:
                self._failures += 1
                is_lost = self._failures == _FAILURES
            if is_lost:
                self._on_lost()
            raise
        with self._lock:
            # Once lost it stays so: what is told once is not told again.
            if self._failures < _FAILURES:
                self._failures = 0
        return result


def _on_cpu(settings: Settings) -> Backend:
    """Not ONNX Runtime's CUDA: an error that lasts is the process's, whoever asks the GPU next."""
    threads = settings.threads or available_cores()
    return OnnxRuntimeBackend(settings.model, threads=threads)


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
