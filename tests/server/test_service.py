"""The service's life: another backend takes over while requests are under way."""

import asyncio
import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from server.backends import BackendInfo
from server.metrics import Metrics
from server.problems import Unavailable
from server.service import Segmentation, Service
from server.settings import Settings
from server.stages import Stages
from tests.lesions import encode_photo, lesion_photo


class Constant:
    """A backend that says one probability, slowly, and fails once it is closed."""

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.closed = False
        self.warm = False

    def describe(self) -> BackendInfo:
        version = str(self.probability)
        return BackendInfo("constant", version, "cpu", "fp32", 4, model={"version": version})

    def warm_up(self) -> None:
        self.warm = True

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        time.sleep(0.01)
        assert self.warm
        assert not self.closed
        return np.full((len(batch), 128, 128), self.probability, np.float32)

    def close(self) -> None:
        self.closed = True


def test_another_backend_takes_over_without_a_failed_request() -> None:
    body = encode_photo(lesion_photo(1, 300, 200).pixels)

    async def segment(service: Service) -> Segmentation:
        return await service.segment(
            body,
            "image/jpeg",
            stages=Stages(),
            deadline=time.perf_counter() + 60,
            is_gone=lambda: False,
        )

    async def scenario() -> None:
        service = Service(Settings(max_wait_ms=5), Metrics())
        with pytest.raises(Unavailable), service.admission(deadline=math.inf):
            pass
        backends = [Constant(value / 8) for value in range(1, 8)]
        await service.use(backends[0])
        tasks = []
        for backend in backends[1:]:
            tasks += [asyncio.create_task(segment(service)) for _ in range(15)]
            await asyncio.sleep(0.01)
            await service.use(backend)
        results = await asyncio.gather(*tasks)
        await service.close()
        # Each answer is of one backend, the one that it names.
        for result in results:
            assert (result.probability == float(result.backend.version)).all()
        assert len({result.backend.version for result in results}) > 3
        assert all(backend.closed for backend in backends)

    asyncio.run(asyncio.wait_for(scenario(), 60))
