"""ONNX Runtime: the default on CPU. Loads the shipped ONNX file in a fraction of a second."""

import os
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo
from server.backends.cpu import CpuBackend, Run, slots_for
from server.backends.model_file import ModelFile, read_model

__all__ = ["OnnxRuntimeBackend", "check_contract", "session_options"]

_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


class OnnxRuntimeBackend(CpuBackend):
    """Runs the exported graph in ONNX Runtime's CPU provider.

    Args:
        model: the ONNX file, or what was read of it.
        threads: number of threads of a lone photo, and of all photos that run at the same time.

    Raises:
        BackendError: the file is no network, or its inputs or outputs are not those of the server.
    """

    def __init__(self, model: Path | ModelFile, *, threads: int) -> None:
        file = read_model(model) if isinstance(model, Path) else model
        slots = slots_for(threads)
        onnxruntime.disable_telemetry_events()
        alone = _open(file, threads)
        # The calling threads count too. With a slot for each thread, it needs no thread of its own.
        helpers = threads - slots
        beside = _open(file, 1 + helpers) if threads > 1 else alone
        info = BackendInfo(
            name="onnxruntime",
            version=onnxruntime.__version__,
            device="cpu",
            precision="fp32",
            # Photos one by one take as long as a batch of them; in a batch they would only wait for
            # each other.
            max_batch=1,
            slots=slots,
            model=dict(alone.get_modelmeta().custom_metadata_map),
            file_sha256=file.sha256,
        )
        super().__init__("ONNX Runtime", info, _run(alone), _run(beside))


def _open(file: ModelFile, threads: int) -> onnxruntime.InferenceSession:
    options = session_options()
    options.intra_op_num_threads = threads
    # A memory plan for each size of batch would make nothing faster here.
    options.enable_mem_pattern = False
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


def _run(session: onnxruntime.InferenceSession) -> Run:
    def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        probability: NDArray[np.float32] = session.run(["probability"], {"image": image})[0]
        return probability

    return run


def session_options() -> onnxruntime.SessionOptions:
    """Options of every session: only errors are printed, and a network is one file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights in a file of their own would not be covered by the network's digest. Such a file is
    # never found in this place.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    return options


def check_contract(session: onnxruntime.InferenceSession, model: Path) -> None:
    """Raise BackendError unless `session` has the inputs and outputs that the server needs."""
    inputs, outputs = (
        [(node.name, _TYPES.get(node.type, node.type), node.shape[1:]) for node in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    side = MODEL_SIZE
    if inputs != [("image", "uint8", [side, side, 3])] or outputs != [
        ("probability", "float32", [side, side])
    ]:
        raise BackendError(
            f"{model} does not keep the served contract (image: uint8 [n, {side}, {side}, 3]"
            f" → probability: float32 [n, {side}, {side}]); it has {inputs} → {outputs}."
            " Export it with `python -m model.export`."
        )
