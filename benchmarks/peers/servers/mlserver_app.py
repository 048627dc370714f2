"""MLServer: https://docs.seldon.ai/mlserver/user-guide/adaptive-batching, a worker for each core.

Photos and masks travel as base64, as bytes do in its protocol's JSON. Under uvloop 0.23, a worker's
start ends the whole server; so an older uvloop is pinned.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from handler import MAX_BATCH, PORT, WORKERS, decode, encode, load
from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse

MAX_BATCH_TIME_S = 0.01


class Segmentation(MLModel):
    """A custom runtime, in the words of MLServer's documentation."""

    async def load(self) -> bool:
        self.network = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        photos = Base64Codec.decode_input(payload.inputs[0])
        try:
            decoded = [decode(photo) for photo in photos]
        except OSError as error:
            raise InferenceError("not an image") from error
        probabilities = self.network(np.stack([pixels for pixels, _ in decoded]))
        masks = [encode(p, size) for p, (_, size) in zip(probabilities, decoded, strict=True)]
        return InferenceResponse(
            model_name=self.name, outputs=[Base64Codec.encode_output("mask", masks)]
        )


if __name__ == "__main__":
    folder = Path(os.environ["PEER_FOLDER"])
    settings = {
        "host": "127.0.0.1",
        "http_port": PORT,
        "grpc_port": PORT + 1,
        "metrics_port": PORT + 2,
        "parallel_workers": WORKERS,
        "metrics_dir": str(folder / "metrics"),
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {
        "name": "segment",
        "implementation": "mlserver_app.Segmentation",
        "max_batch_size": MAX_BATCH,
        "max_batch_time": MAX_BATCH_TIME_S,
    }
    (folder / "model-settings.json").write_text(json.dumps(model))
    binary = Path(sys.executable).with_name("mlserver")
    here = str(Path(__file__).parent)
    os.execve(binary, [str(binary), "start", str(folder)], {**os.environ, "PYTHONPATH": here})
