"""BentoML: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html.

As on that page, one service takes single photos, and another behind it runs the network in batches
whose size it chooses. `workers` uses more than one core, as on
https://docs.bentoml.com/en/latest/build-with-bentoml/parallelize-requests.html.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
from bentoml.exceptions import InvalidArgument
from bentoml.validators import ContentType
from handler import MAX_BATCH, PORT, TIMEOUT_S, WORKERS, decode, encode, load


@bentoml.service(workers=WORKERS, traffic={"timeout": TIMEOUT_S})
class Network:
    """Runs the network on batches, in a process for each core."""

    def __init__(self) -> None:
        self.network = load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=TIMEOUT_S * 1000)
    def run(self, pixels: np.ndarray) -> np.ndarray:
        return self.network(pixels)


@bentoml.service(workers=WORKERS, threads=16, traffic={"timeout": TIMEOUT_S})
class Segmentation:
    """The service that clients see."""

    network = bentoml.depends(Network)

    @bentoml.api(route="/segment")
    def segment(
        self, photo: Annotated[Path, ContentType("image/jpeg")], /, ctx: bentoml.Context
    ) -> bytes:
        try:
            pixels, size = decode(photo.read_bytes())
        except OSError as error:
            raise InvalidArgument("not an image") from error
        ctx.response.headers["content-type"] = "image/png"
        return encode(self.network.run(pixels[None])[0], size)


if __name__ == "__main__":
    bento = Path(sys.executable).with_name("bentoml")
    arguments = ["serve", "bentoml_app:Segmentation", "--host=127.0.0.1", f"--port={PORT}"]
    arguments += ["--quiet"]  # no peer logs requests
    os.execve(bento, [str(bento), *arguments], {**os.environ, "BENTOML_DO_NOT_TRACK": "True"})
