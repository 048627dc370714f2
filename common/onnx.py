"""Opens ONNX files in ONNX Runtime, as all but the server's backends do."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from common.stamp import Infer

__all__ = ["onnx_runner", "onnx_session"]

_CPU = ("CPUExecutionProvider",)


def onnx_session(
    model: Path | bytes, providers: Sequence[str] = _CPU, *, exact: bool = False
) -> onnxruntime.InferenceSession:
    """Open a file, or its bytes; `exact` turns off optimisation, which may drop rounding."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=list(providers))


def onnx_runner(
    model: Path | bytes, providers: Sequence[str] = _CPU, *, exact: bool = False
) -> Infer:
    """A function that runs an exported network; arguments are those of `onnx_session`."""
    session = onnx_session(model, providers, exact=exact)

    def infer(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(["probability"], {"image": batch})[0]
        return result

    return infer
