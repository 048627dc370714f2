"""OpenVINO in bfloat16: the fastest on CPUs that multiply bfloat16 (AVX-512 BF16, AMX).

In float32 ONNX Runtime is as fast, so it does not run elsewhere (docs/cpu-engine.md).
"""

import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from common.stamp import trial_images
from photos.image import MODEL_SIZE, THRESHOLD
from server.backends import BackendError
from server.backends.cpu import CpuBackend, Run, slots_for
from server.backends.model_file import read_model
from server.backends.onnxruntime import OnnxRuntimeBackend

__all__ = ["OpenVinoBackend"]

_LEAST_OVERLAP = 0.995
"""Mean IoU of masks in bfloat16 and float32, as the parity gate has it for TensorRT's engines."""


class OpenVinoBackend(CpuBackend):
    """Runs the exported graph in OpenVINO's CPU plugin, with products of bfloat16.

    Args:
        model: the ONNX file.
        threads: number of threads of a lone photo, and of all photos that run at the same time.

    Raises:
        BackendError: the processor has no products of bfloat16, the file is no network, or its
            inputs or outputs are not those of the server, or bfloat16 changes its masks.
    """

    def __init__(self, model: Path, *, threads: int) -> None:
        core = openvino.Core()
        can = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in can:
            raise BackendError(
                "OpenVINO is not used here, since this processor does not multiply bfloat16"
                f" (it has {', '.join(sorted(can))}): take --backend onnxruntime, which is as fast"
            )
        file = read_model(model)
        # ONNX Runtime reads it first, and refuses what is no ONNX or keeps another contract.
        # OpenVINO reads other formats too, and where a file names an address in memory it reads
        # that, or crashes.
        float32 = OnnxRuntimeBackend(file, threads=1)
        images = trial_images()
        masks = float32.infer(images) > THRESHOLD
        float32.close()
        slots = slots_for(threads)
        try:
            graph = core.read_model(file.content)
            # Code for one shape alone is a seventh faster than for any size of batch.
            graph.reshape([1, MODEL_SIZE, MODEL_SIZE, 3])
            alone = _open(core, graph, threads, 1)
            beside = _open(core, graph, threads, slots) if threads > 1 else alone
        except Exception as error:
            # Its messages have several lines.
            said = " ".join(str(error).split())
            raise BackendError(f"OpenVINO cannot load {file.path}: {said}") from error
        info = replace(
            float32.describe(),
            name="openvino",
            version=openvino.__version__,
            precision="bf16",
            slots=slots,
        )
        super().__init__("OpenVINO", info, alone, beside)
        overlap = _overlap(self.infer(images) > THRESHOLD, masks)
        if overlap < _LEAST_OVERLAP:
            raise BackendError(
                f"OpenVINO does not run {model}: bfloat16 changes its masks (mean IoU with float32"
                f" {overlap:.4f} on the trial images, at least {_LEAST_OVERLAP} is needed): take"
                " --backend onnxruntime"
            )


def _overlap(masks: NDArray[np.bool_], others: NDArray[np.bool_]) -> float:
    """Mean IoU of two masks of each image; 1 where both are empty."""
    common, either = (np.count_nonzero(m, (1, 2)) for m in (masks & others, masks | others))
    return float(np.divide(common, either, out=np.ones(len(masks)), where=either > 0).mean())


def _open(core: openvino.Core, graph: openvino.Model, threads: int, together: int) -> Run:
    compiled = core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": together,
            # A server's other threads run on the same cores.
            "ENABLE_CPU_PINNING": False,
        },
    )
    # A request holds one run's memory, and takes one run at a time.
    free: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
    for _ in range(together):
        free.put(compiled.create_infer_request())

    def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        request = free.get()
        try:
            probability: NDArray[np.float32] = request.infer([image])[0]
            return probability
        finally:
            free.put(request)

    return run
