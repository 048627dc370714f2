"""Ray Serve: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html.

`serve.batch` with its default of 10 ms; a replica for each core.
"""

import asyncio
import logging
import os
import signal

import numpy as np
import ray
from handler import MAX_BATCH, PORT, THREADS, WORKERS, decode, encode, load
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

BATCH_WAIT_S = 0.01


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=4 * MAX_BATCH,
    ray_actor_options={"num_cpus": THREADS},
)
class Segmentation:
    """One replica."""

    def __init__(self) -> None:
        self.network = load()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def run(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        return list(await asyncio.to_thread(self.network, np.stack(pixels)))

    async def __call__(self, request: Request) -> Response:
        photo = await request.body()
        try:
            pixels, size = await asyncio.to_thread(decode, photo)
        except OSError:
            return PlainTextResponse("not an image", 422)
        probability = await self.run(pixels)
        return Response(await asyncio.to_thread(encode, probability, size), media_type="image/png")


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=os.environ["PEER_FOLDER"],
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"log_level": "WARNING"}
    )
    serve.run(Segmentation.bind(), route_prefix="/segment")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
