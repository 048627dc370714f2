"""ONNX Runtime's CUDA provider: serves on a GPU at once, while or where TensorRT does not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo
from server.backends.model_file import read_model
from server.backends.onnxruntime import check_contract
from trt_build.device import NoGpuError, current_gpu

__all__ = ["OnnxRuntimeCudaBackend"]

log = logging.getLogger("slsnet.onnxruntime")

_PROVIDER = "CUDAExecutionProvider"

# The exported attention holds two float32 matrices of 67 MB an image: 2.1 GB at 16.
_BUCKETS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class _Lane:
    """One batch size with buffers on the GPU whose addresses never change, as a graph needs."""

    image: Any
    probability: Any
    binding: Any
    options: Any


class OnnxRuntimeCudaBackend:
    """The exported graph on an NVIDIA GPU in float32, as a CUDA graph where it can be captured.

    Raises:
        BackendError: no CUDA provider, no driver, no GPU, or a provider that does not load.
    """

    def __init__(self, model: Path) -> None:
        if _PROVIDER not in onnxruntime.get_available_providers():
            raise BackendError("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
        try:
            self._gpu = current_gpu()
        except NoGpuError as error:
            raise BackendError(f"ONNX Runtime cannot use CUDA: {error}") from error
        # Finds CUDA and cuDNN where they were installed as wheels.
        onnxruntime.preload_dlls()
        self._file = read_model(model)
        self._lock = Lock()
        try:
            self._open(graphs=True)
        except BackendError as error:
            log.warning("no CUDA graphs in ONNX Runtime: %s", error)
            self._open(graphs=False)

    def describe(self) -> BackendInfo:
        return BackendInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device=self._gpu.name,
            precision="fp32",
            max_batch=_BUCKETS[-1],
            buckets=_BUCKETS,
            model=dict(self._session.get_modelmeta().custom_metadata_map),
            file_sha256=self._file.sha256,
        )

    def warm_up(self) -> None:
        for bucket in _BUCKETS:
            self.infer(np.zeros((bucket, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(batch) > _BUCKETS[-1]:
            most = _BUCKETS[-1]
            parts = [self.infer(batch[i : i + most]) for i in range(0, len(batch), most)]
            return np.concatenate(parts)
        bucket = next(size for size in _BUCKETS if size >= len(batch))
        padded = batch
        if len(batch) < bucket:
            padded = np.zeros((bucket, *batch.shape[1:]), np.uint8)
            padded[: len(batch)] = batch
        # A session that replays graphs runs one batch at a time.
        with self._lock, _as_backend_error(f"a batch of {len(batch)} failed"):
            lane = self._lane(bucket)
            lane.image.update_inplace(np.ascontiguousarray(padded))
            self._session.run_with_iobinding(lane.binding, lane.options)
            probability: NDArray[np.float32] = lane.probability.numpy()
        return probability[: len(batch)]

    def close(self) -> None:
        self._lanes.clear()
        del self._session

    def _open(self, *, graphs: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # TF32 would cost the channel attention's energies their last digits, for a fallback.
        cuda = {"enable_cuda_graph": str(int(graphs)), "use_tf32": "0"}
        with _as_backend_error(f"ONNX Runtime cannot load {self._file.path} on {self._gpu.name}"):
            self._session = onnxruntime.InferenceSession(
                self._file.content, options, providers=[(_PROVIDER, cuda), "CPUExecutionProvider"]
            )
        # It goes on with the CPU, and a line on stderr, where CUDA's libraries are missing.
        if self._session.get_providers()[0] != _PROVIDER:
            raise BackendError("ONNX Runtime's CUDA provider does not load: see its message above")
        check_contract(self._session, self._file.path)
        self._lanes: dict[int, _Lane] = {}
        self._graphs = graphs
        # The first run captures, the second replays: a graph that does not hold fails here.
        for _ in range(2):
            self.infer(np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def _lane(self, bucket: int) -> _Lane:
        if bucket not in self._lanes:
            new = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            image = new([bucket, MODEL_SIZE, MODEL_SIZE, 3], np.uint8, "cuda", 0)
            probability = new([bucket, MODEL_SIZE, MODEL_SIZE], np.float32, "cuda", 0)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input("image", image)
            binding.bind_ortvalue_output("probability", probability)
            options = onnxruntime.RunOptions()
            if self._graphs:
                options.add_run_config_entry("gpu_graph_id", str(bucket))
            self._lanes[bucket] = _Lane(image, probability, binding, options)
        return self._lanes[bucket]


@contextmanager
def _as_backend_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BackendError(f"{what}: {error}") from error
