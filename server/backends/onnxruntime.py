"""ONNX Runtime: the default on CPU. Loads the shipped ONNX file in a fraction of a second."""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo
from server.backends.model_file import read_model

__all__ = ["OnnxRuntimeBackend", "check_contract"]

# On CPU a batch takes as long as its images one by one, so it only saves hand-offs; a large one
# would make those who come next wait for all of it.
_MAX_BATCH = 8


class OnnxRuntimeBackend:
    """The exported graph in ONNX Runtime's CPU provider."""

    def __init__(self, model: Path, *, threads: int) -> None:
        file = read_model(model)
        self._sha256 = file.sha256
        onnxruntime.disable_telemetry_events()
        # One for each thread fills them; memory grows by about 80 MiB with each.
        self._run_together = min(threads, _MAX_BATCH)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A plan for each size of batch, each with memory of its own, makes nothing faster here.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        # Threads that spin while they wait for the next inference take the cores from decoding.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                file.content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {file.path}: {error}") from error
        check_contract(self._session, file.path)

    def describe(self) -> BackendInfo:
        return BackendInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            precision="fp32",
            max_batch=_MAX_BATCH,
            model=dict(self._session.get_modelmeta().custom_metadata_map),
            file_sha256=self._sha256,
        )

    def warm_up(self) -> None:
        # The largest run takes all the memory there will ever be; smaller ones fit in.
        self.infer(np.zeros((self._run_together, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        together = self._run_together
        parts = [batch[start : start + together] for start in range(0, len(batch), together)]
        try:
            return np.concatenate(
                [self._session.run(["probability"], {"image": part})[0] for part in parts]
            )
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a batch of {len(batch)}: {error}"
            ) from error

    def close(self) -> None:
        del self._session


def check_contract(session: onnxruntime.InferenceSession, model: Path) -> None:
    """Raise BackendError unless `session` takes and gives what is served."""
    inputs = [(node.name, node.type, node.shape[1:]) for node in session.get_inputs()]
    outputs = [(node.name, node.type, node.shape[1:]) for node in session.get_outputs()]
    side = MODEL_SIZE
    if inputs != [("image", "tensor(uint8)", [side, side, 3])] or outputs != [
        ("probability", "tensor(float)", [side, side])
    ]:
        raise BackendError(
            f"{model} does not keep the served contract (image: uint8 [n, {side}, {side}, 3]"
            f" → probability: float32 [n, {side}, {side}]); it has {inputs} → {outputs}."
            " Export it with `python -m model.export`."
        )
