"""Triton's Python backend: bytes of photos in, bytes of masks out."""

import numpy as np
import triton_python_backend_utils as triton
from handler import decode, encode, load


class TritonPythonModel:
    """Triton finds the backend by this name."""

    def initialize(self, args: dict) -> None:  # noqa: ARG002
        self.network = load()

    def execute(self, requests: list) -> list:
        responses: list = []
        good = []
        for request in requests:
            photo = triton.get_input_tensor_by_name(request, "photo").as_numpy()[0, 0]
            try:
                good.append((len(responses), *decode(photo)))
                responses.append(None)
            except OSError:
                error = triton.TritonError("not an image", triton.TritonError.INVALID_ARG)
                responses.append(triton.InferenceResponse(error=error))
        if good:
            probabilities = self.network(np.stack([pixels for _, pixels, _ in good]))
            for (place, _, size), probability in zip(good, probabilities, strict=True):
                mask = np.array([[encode(probability, size)]], np.object_)
                responses[place] = triton.InferenceResponse([triton.Tensor("mask", mask)])
        return responses
