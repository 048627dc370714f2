"""The server's load of a network, alone."""

import asyncio
from pathlib import Path

from server.inference.loading import Loader
from server.inference.service import Service
from server.observe.metrics import Metrics
from server.settings import Settings


def load(model: Path) -> None:
    """Load a network's file as the server does, and let it go again.

    Raises:
        BackendError: the server refuses it.
    """

    async def scenario() -> None:
        service = Service(Settings(model=model, backend="onnxruntime", threads=1), Metrics())
        loader = Loader(service, service.networks.default)
        try:
            await loader.load()
        finally:
            await loader.close()
            await service.close()

    asyncio.run(scenario())
