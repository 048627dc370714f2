"""mosec: https://mosecorg.github.io/mosec, batching and its 10 ms as in the README's example."""

import sys

import numpy as np
from handler import MAX_BATCH, PORT, TIMEOUT_S, WORKERS, decode, encode, load
from mosec import Server, ValidationError, Worker

MAX_WAIT_MS = 10


class Segmentation(Worker):
    """Everything in one stage. Three stages, with processes of their own, were slower here."""

    resp_mime_type = "image/png"

    def __init__(self) -> None:
        super().__init__()
        self.network = load()

    def deserialize(self, data: bytes) -> tuple:
        try:
            return decode(data)
        except OSError as error:
            raise ValidationError("not an image") from error

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[tuple]) -> list[bytes]:
        probabilities = self.network(np.stack([pixels for pixels, _ in data]))
        return [encode(p, size) for p, (_, size) in zip(probabilities, data, strict=True)]


if __name__ == "__main__":
    sys.argv += [f"--port={PORT}", "--address=127.0.0.1", f"--timeout={TIMEOUT_S * 1000}"]
    sys.argv += ["--log-level=warning"]
    server = Server()
    server.append_worker(
        Segmentation, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS
    )
    server.run()
