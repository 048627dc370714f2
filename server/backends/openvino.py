"""OpenVINO in bfloat16: the fastest on CPUs that multiply bfloat16 (AVX-512 BF16, AMX).

In float32 ONNX Runtime is as fast, so it does not run elsewhere (docs/cpu-engine.md).
"""

import queue
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from common.stamp import trial_images
from photos.image import MODEL_SIZE, THRESHOLD
from server.backends import BackendError, BackendInfo
from server.backends.cpu import CpuBackend, Run, Tensor, check_contract, slots_for
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
        # ONNX Runtime reads it first, and refuses all that is no ONNX. OpenVINO reads other formats
        # too, and where a file names an address in memory it reads that, or crashes.
        float32 = OnnxRuntimeBackend(file, threads=1)
        masks = float32.infer(trial_images()) > THRESHOLD
        float32.close()
        slots = slots_for(threads)
        try:
            graph = core.read_model(file.content)
            check_contract(_tensors(graph.inputs), _tensors(graph.outputs), file.path)
            # Code for one shape alone is a seventh faster than for any size of batch.
            graph.reshape([1, MODEL_SIZE, MODEL_SIZE, 3])
            alone = _compile(core, graph, threads, 1)
            beside = _compile(core, graph, threads, slots) if threads > 1 else alone
        except BackendError:
            raise
        except Exception as error:
            # Its messages have several lines.
            said = " ".join(str(error).split())
            raise BackendError(f"OpenVINO cannot load {file.path}: {said}") from error
        info = BackendInfo(
            name="openvino",
            version=openvino.__version__,
            device="cpu",
            precision="bf16",
            max_batch=1,
            slots=slots,
            model=float32.describe().model,
            file_sha256=file.sha256,
        )
        super().__init__("OpenVINO", info, _run(alone, 1), _run(beside, slots))
        self._check_masks(masks, model)

    def _check_masks(self, float32: NDArray[np.bool_], model: Path) -> None:
        ours = self.infer(trial_images()) > THRESHOLD
        common, either = (np.count_nonzero(m, (1, 2)) for m in (ours & float32, ours | float32))
        overlap = float(np.divide(common, either, out=np.ones(len(ours)), where=either > 0).mean())
        if overlap < _LEAST_OVERLAP:
            raise BackendError(
                f"OpenVINO does not run {model}: bfloat16 changes its masks (mean IoU with float32"
                f" {overlap:.4f} on the trial images, at least {_LEAST_OVERLAP} is needed): take"
                " --backend onnxruntime"
            )


def _tensors(ports: list[openvino.Output]) -> list[Tensor]:
    return [
        (
            port.any_name,
            port.element_type.to_dtype().name,
            [None if side.is_dynamic else side.get_length() for side in port.partial_shape],
        )
        for port in ports
    ]


def _compile(
    core: openvino.Core, graph: openvino.Model, threads: int, streams: int
) -> openvino.CompiledModel:
    return core.compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            # A server's other threads run on the same cores.
            "ENABLE_CPU_PINNING": False,
        },
    )


def _run(compiled: openvino.CompiledModel, together: int) -> Run:
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
