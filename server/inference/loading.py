"""Loads backends: CPU or CUDA serves at once, TensorRT takes over once it is built."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.backends import Backend, BackendError, BackendInfo, open_backend
from server.backends.engine_cache import EngineCache, EngineEvent, open_engine_cache
from server.backends.memory import check_memory
from server.inference.served import Served
from server.inference.service import Service
from server.settings import Settings, name_in

__all__ = ["Loader"]

log = logging.getLogger("slsnet.loading")

# Seconds: the longest pause between two attempts to reload a backend that failed.
_LONGEST_PAUSE_S = 30


class Loader:
    """Loads a network at the start, on request, and when the backend in use fails.

    Args:
        service: lets it serve.
        served: the network.
    """

    def __init__(self, service: Service, served: Served) -> None:
        self._service = service
        self._served = served
        self._stop = threading.Event()
        self._better: asyncio.Task[None] | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()

    async def load(self) -> BackendInfo:
        """Load the network from its file, and swap it in once it is warm.

        Meanwhile the previous backend serves, and it goes on if this fails. A better backend that
        takes time to build takes over later.

        Raises:
            BackendError: nothing can serve, there is no memory for it, TensorRT was asked for and
                cannot be used here, or the default one's file has another network than before.
        """
        async with self._one_at_a_time:
            try:
                info = await self._load()
            except Exception:
                self._service.metrics.reloads.labels("failed").inc()
                raise
            self._service.metrics.reloads.labels("succeeded").inc()
            return info

    async def close(self) -> None:
        """Stop building and recovering."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._stop_building()

    async def _stop_building(self) -> None:
        self._stop.set()
        if self._better is not None:
            await asyncio.wait([self._better])

    async def _load(self) -> BackendInfo:
        service, file = self._service, self._served.file
        settings = service.settings
        await service.threads.run(check_memory, file)
        if self._served is service.networks.default:
            await service.threads.run(_check_name, self._served)
        engines = await service.threads.run(lambda: _engines(settings, file, self._count))
        engine = await service.threads.run(engines.load) if engines is not None else None
        has_engine = engine is not None and await self._take_over(engine)
        if not has_engine:
            first = await service.threads.run(_first, settings, file)
            await service.use(first, self._failing, self._served)
        if engines is not None and (has_engine or engine is None):
            # A build in progress is for the previous network.
            await self._stop_building()
            self._stop = threading.Event()
            better = self._build(engines, self._stop, has_engine=has_engine)
            self._better = asyncio.create_task(better)
        return self._served.current.info

    async def _build(
        self, engines: EngineCache, stop: threading.Event, *, has_engine: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        # It has a thread of its own, since it blocks for as long as a build or a lull takes.
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            if not has_engine:
                engine = await loop.run_in_executor(thread, engines.obtain, stop)
                has_engine = await self._take_over_unless(stop, engine)
            if has_engine:
                idle_s = self._service.networks.idle_s
                engine = await loop.run_in_executor(thread, engines.rebuild, stop, idle_s)
                await self._take_over_unless(stop, engine)

    async def _take_over_unless(self, stop: threading.Event, engine: Backend | None) -> bool:
        return engine is not None and not stop.is_set() and await self._take_over(engine)

    async def _take_over(self, engine: Backend) -> bool:
        """Let `engine` serve, and let the CPU replace it if the GPU is lost."""
        try:
            await self._service.use(engine, self._lost, self._served)
        except BackendError as error:
            self._count("load_failed")
            log.error("the engine does not take over: %s", error)
            return False
        return True

    def _lost(self) -> None:
        self._count("lost")
        log.error(
            "engine lost: it fails on every batch, or hangs; the CPU serves %s now",
            self._served.name,
        )
        self._recover(_on_cpu)

    def _failing(self) -> None:
        log.error(
            "the network %s fails on every batch, or hangs: requests are refused until it works",
            self._served.name,
        )
        self._recover(_first)

    def _recover(self, open_anew: Callable[[Settings, Path], Backend]) -> None:
        self._recovery = asyncio.create_task(self._reopen(open_anew))

    async def _reopen(self, open_anew: Callable[[Settings, Path], Backend]) -> None:
        service, served = self._service, self._served
        pause_s = 0.5
        while True:
            try:
                async with self._one_at_a_time:
                    if served.is_failing:
                        backend = await service.threads.run(
                            open_anew, service.settings, served.file
                        )
                        await service.use(backend, self._failing, served)
                return
            except BackendError as error:
                log.error("the backend still fails: %s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _count(self, event: EngineEvent) -> None:
        self._service.metrics.engine_events.labels(event=event).inc()


def _check_name(served: Served) -> None:
    """Refuse another network than the one whose name requests know."""
    name = name_in(served.file)
    if name != served.name:
        raise BackendError(
            f"{served.file} holds the network {name}, and requests call this one {served.name}:"
            f" start the server anew to serve {name}."
        )


def _on_cpu(settings: Settings, file: Path) -> Backend:
    """Load ONNX Runtime for the CPU: a lasting CUDA error holds for every user in this process."""
    # Imported here, as `open_backend` does: with a GPU it may never be needed.
    from server.backends.onnxruntime import OnnxRuntimeBackend

    threads = settings.threads or settings.cores
    return OnnxRuntimeBackend(file, threads=threads)


def _first(settings: Settings, file: Path) -> Backend:
    threads = settings.threads or settings.cores
    return open_backend(settings.backend, file, threads=threads)


def _engines(
    settings: Settings, file: Path, count: Callable[[EngineEvent], None]
) -> EngineCache | None:
    """The engine cache; None if TensorRT is not wanted, or cannot be used and is not required."""
    if settings.backend not in ("auto", "tensorrt"):
        return None
    try:
        return open_engine_cache(
            _engine_dir(settings),
            file,
            settings.precision,
            count,
            cores=settings.cores,
        )
    except BackendError as error:
        if settings.backend == "tensorrt":
            raise
        log.debug("no TensorRT: %s", error)
        return None


def _engine_dir(settings: Settings) -> Path:
    try:
        return settings.engine_dir.expanduser()
    except RuntimeError as error:
        # There is no HOME, and the system does not know the user.
        raise BackendError(
            f"{settings.engine_dir} is no folder, name one with --engine-dir (SLSNET_ENGINE_DIR):"
            f" {error}"
        ) from error
