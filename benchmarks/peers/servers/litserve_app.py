"""LitServe: https://lightning.ai/docs/litserve/features/batching.

LitServe recommends `fast_queue` above 100 requests/s. There is a worker for each core.
"""

import litserve
import numpy as np
from fastapi import HTTPException, Request, Response
from handler import MAX_BATCH, PORT, TIMEOUT_S, WORKERS, decode, encode, load

BATCH_TIMEOUT_S = 0.01


class Segmentation(litserve.LitAPI):
    """The example with batches of LitServe's documentation."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.network = load()

    def decode_request(self, request: Request) -> tuple:
        try:
            return decode(request["photo"].file.read())
        except OSError as error:
            raise HTTPException(422, "not an image") from error

    def batch(self, inputs: list[tuple]) -> tuple:
        pixels, sizes = zip(*inputs, strict=True)
        return np.stack(pixels), sizes

    def predict(self, batch: tuple) -> list[tuple]:
        pixels, sizes = batch
        return list(zip(self.network(pixels), sizes, strict=True))

    def unbatch(self, output: list[tuple]) -> list[tuple]:
        return output

    def encode_response(self, output: tuple) -> Response:
        return Response(encode(*output), media_type="image/png")


if __name__ == "__main__":
    server = litserve.LitServer(
        Segmentation(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S),
        accelerator="cpu",
        workers_per_device=WORKERS,
        timeout=TIMEOUT_S,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
