"""TensorRT: an engine file built by `trt_build`, run by TensorRT or its lean runtime."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.device import NoGpuError
from engines.plan import PlanError
from engines.runtime import SLOTS, EngineError, EngineRunner
from engines.tensorrt_api import TensorRTError
from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo, Images

__all__ = ["TensorRtBackend"]


class TensorRtBackend:
    """Runs an engine on the GPU.

    Loading runs and records every bucket, so the first request is as fast as any.

    Args:
        engine: path of the engine file.
        spin: whether threads ask the GPU all the time while they wait; each slot takes a core.

    Raises:
        BackendError: no driver, no GPU, no TensorRT, not enough GPU memory, or an engine file that
            is truncated, corrupt, or of another TensorRT version or GPU. Its cause says which.
    """

    def __init__(self, engine: Path, *, spin: bool = False) -> None:
        try:
            self._runner = EngineRunner(engine, spin=spin)
        except (EngineError, NoGpuError, PlanError, TensorRTError) as error:
            raise BackendError(f"TensorRT cannot serve {engine}: {error}") from error

    def describe(self) -> BackendInfo:
        key = self._runner.info.key
        return BackendInfo(
            name="tensorrt",
            version=self._runner.library,
            device=self._runner.gpu.name,
            precision=key.precision,
            max_batch=key.buckets[-1],
            slots=SLOTS,
            buckets=key.buckets,
            model=dict(self._runner.info.model),
            file_sha256=key.onnx_sha256,
        )

    def warm_up(self) -> None:
        self.infer(np.zeros((1, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        try:
            return self._runner.infer(batch)
        except EngineError as error:
            raise BackendError(str(error)) from error

    def close(self) -> None:
        self._runner.close()
