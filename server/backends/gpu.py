"""Whether a backend would run on a GPU here.

    python -m server.backends.gpu NAME

ends with 0 if so, and with 1 if not. It is a process of its own since what it asks may take memory,
on the GPU too, for as long as the process lives.
"""

import sys

from engines.device import NoGpuError, current_gpu
from engines.tensorrt_api import TensorRTError, find_tensorrt

__all__ = ["runs_on_gpu"]


def runs_on_gpu(name: str) -> bool:
    """Whether the backend `name` would run on a GPU, as far as can be told without loading it.

    Args:
        name: as for `open_backend`.
    """
    if name == "torch":
        try:
            import torch
        except ImportError:
            return False
        return torch.cuda.is_available()
    try:
        gpu = current_gpu()
    except NoGpuError:
        return False
    if name != "onnxruntime":
        try:
            find_tensorrt().check_runs_on(gpu)
        except TensorRTError:
            pass
        else:
            return True
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


if __name__ == "__main__":
    sys.exit(not runs_on_gpu(sys.argv[1]))
