"""ONNX Runtime: the default on CPU. Loads the shipped ONNX file in a fraction of a second."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo, Images
from server.backends.model_file import ModelFile, read_model

__all__ = ["OnnxRuntimeBackend", "check_contract"]

# Each run takes memory of its own: about 80 MiB with exact attention.
_MOST_TOGETHER = 8


class OnnxRuntimeBackend:
    """Runs the exported graph in ONNX Runtime's CPU provider.

    A lone photo runs on all threads. Photos that come together run on one thread each, which does
    more in all: threads that share a photo wait for each other after every layer.

    Args:
        model: the ONNX file.
        threads: number of threads of a lone photo, and of all photos that run at the same time.

    Raises:
        BackendError: the file is no network, or its inputs or outputs are not those of the server.
    """

    def __init__(self, model: Path, *, threads: int) -> None:
        file = read_model(model)
        self._sha256 = file.sha256
        self._slots = min(threads, _MOST_TOGETHER)
        onnxruntime.disable_telemetry_events()
        self._alone = _open(file, threads)
        # The calling threads count too. With a slot for each thread, it needs no thread of its own.
        helpers = threads - self._slots
        self._beside = _open(file, 1 + helpers) if threads > 1 else self._alone
        self._running = 0
        self._lock = threading.Lock()

    def describe(self) -> BackendInfo:
        return BackendInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            precision="fp32",
            # Photos one by one take as long as a batch of them; in a batch they would only wait for
            # each other.
            max_batch=1,
            slots=self._slots,
            model=dict(self._alone.get_modelmeta().custom_metadata_map),
            file_sha256=self._sha256,
        )

    def warm_up(self) -> None:
        # Run as many as ever run together, so that all memory is taken now.
        image = np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
        self.infer(image)
        with ThreadPoolExecutor(self._slots) as threads:
            list(threads.map(self.infer, [image] * self._slots))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        with self._lock:
            session = self._beside if self._running else self._alone
            self._running += 1
        try:
            return np.concatenate(
                [session.run(["probability"], {"image": image[None]})[0] for image in batch]
            )
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a batch of {len(batch)}: {error}"
            ) from error
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        del self._alone, self._beside


def _open(file: ModelFile, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A memory plan for each size of batch would make nothing faster here.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    # Between two layers threads wait awake for as long as most layers keep them waiting, and then
    # sleep: longer would take the cores from others, shorter costs a wake-up after each layer.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            file.content, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot load {file.path}: {error}") from error
    check_contract(session, file.path)
    return session


def check_contract(session: onnxruntime.InferenceSession, model: Path) -> None:
    """Raise BackendError unless `session` has the inputs and outputs that the server needs."""
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
