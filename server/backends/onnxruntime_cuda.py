"""ONNX Runtime's CUDA provider: serves on a GPU at once, until TensorRT does, or instead of it.

The provider keeps its recorded graphs by thread, and records in CUDA's global mode: meanwhile no
other thread may allocate on the GPU, or copy and wait (onnxruntime's `cuda_execution_provider.cc`
and `cuda_graph.cc`). So one thread of the process loads, records and runs all graphs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from engines.device import NoGpuError, current_gpu
from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo, Images
from server.backends.model_file import read_model
from server.backends.onnxruntime import check_contract, session_options
from server.backends.threads import DaemonThreads

__all__ = ["OnnxRuntimeCudaBackend"]

log = logging.getLogger("slsnet.onnxruntime")

_PROVIDER = "CUDAExecutionProvider"

# The exported attention holds two float32 matrices of 67 MB an image: 2.1 GB at 16.
_BUCKETS = (1, 2, 4, 8, 16)

STUCK_S = 30.0
"""A batch of 16 takes milliseconds: a thread that is busy for so long is stuck in the driver."""


@dataclass(frozen=True)
class _Lane:
    """One batch size with buffers on the GPU whose addresses never change, as a graph needs."""

    pixels: NDArray[np.uint8]
    """Pixels on the host, where the images of a batch come together."""
    image: Any
    probability: Any
    binding: Any
    options: Any


class OnnxRuntimeCudaBackend:
    """Runs the exported graph on an NVIDIA GPU in float32, as CUDA graphs where that works.

    Loading runs every bucket, so the first request is as fast as any.

    Raises:
        BackendError: there is no CUDA provider, driver or GPU, the provider does not load, or the
            previous network is still stuck on the GPU.
    """

    def __init__(self, model: Path) -> None:
        if _PROVIDER not in onnxruntime.get_available_providers():
            raise BackendError("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
        try:
            self._gpu = current_gpu()
        except NoGpuError as error:
            raise BackendError(f"ONNX Runtime cannot use CUDA: {error}") from error
        # It finds CUDA and cuDNN that were installed as wheels.
        onnxruntime.preload_dlls()
        self._file = read_model(model)
        try:
            _gpu_thread().submit(lambda: None).result(STUCK_S)
        except TimeoutError as error:
            raise BackendError(f"{self._gpu.name} has not come back for {STUCK_S:g} s") from error
        _gpu_thread().submit(self._load).result()

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
        """Do nothing: loading ran every bucket."""

    def infer(self, batch: Images) -> NDArray[np.float32]:
        if len(batch) > _BUCKETS[-1]:
            most = _BUCKETS[-1]
            parts = [self.infer(batch[i : i + most]) for i in range(0, len(batch), most)]
            return np.concatenate(parts)
        with _as_backend_error(f"a batch of {len(batch)} failed"):
            return _gpu_thread().submit(lambda: self._run(batch)).result()[: len(batch)]

    def close(self) -> None:
        _gpu_thread().submit(self._close).result()

    def _run(self, batch: Images) -> NDArray[np.float32]:
        lane = self._lane(next(size for size in _BUCKETS if size >= len(batch)))
        # What follows these images is of an earlier batch. Its answers are not read.
        for place, image in zip(lane.pixels, batch, strict=False):
            place[...] = image
        lane.image.update_inplace(lane.pixels)
        self._session.run_with_iobinding(lane.binding, lane.options)
        probability: NDArray[np.float32] = lane.probability.numpy()
        return probability

    def _close(self) -> None:
        self._lanes.clear()
        del self._session

    def _load(self) -> None:
        try:
            self._open(graphs=True)
        except BackendError as error:
            log.warning("no CUDA graphs in ONNX Runtime: %s", error)
            self._open(graphs=False)

    def _open(self, *, graphs: bool) -> None:
        options = session_options()
        # TF32 would cost the channel attention's energies their last digits.
        cuda = {"enable_cuda_graph": str(int(graphs)), "use_tf32": "0"}
        with _as_backend_error(f"ONNX Runtime cannot load {self._file.path} on {self._gpu.name}"):
            self._session = onnxruntime.InferenceSession(
                self._file.content, options, providers=[(_PROVIDER, cuda), "CPUExecutionProvider"]
            )
        # If CUDA's libraries are missing, the provider goes on with the CPU and a line on stderr.
        if self._session.get_providers()[0] != _PROVIDER:
            raise BackendError("ONNX Runtime's CUDA provider does not load: see its message above")
        check_contract(self._session, self._file.path)
        self._lanes: dict[int, _Lane] = {}
        self._graphs = graphs
        with _as_backend_error("the first runs failed"):
            for bucket in _BUCKETS:
                image = np.zeros((bucket, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
                # The second run replays what the first captured, so a bad graph fails here.
                for _ in range(2):
                    self._run(image)

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
            pixels = np.zeros((bucket, MODEL_SIZE, MODEL_SIZE, 3), np.uint8)
            self._lanes[bucket] = _Lane(pixels, image, probability, binding, options)
        return self._lanes[bucket]


@cache
def _gpu_thread() -> DaemonThreads:
    return DaemonThreads(1, "onnxruntime_cuda")


@contextmanager
def _as_backend_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BackendError(f"{what}: {error}") from error
