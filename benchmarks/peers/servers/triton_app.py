"""Triton's core with its Python backend, from NVIDIA's wheel of PyTriton.

Dynamic batching as https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/
batcher.html recommends: all defaults, so no delay; an instance for each core.
"""

import os
import shutil
import sys
from pathlib import Path

import pytriton
from handler import MAX_BATCH, PORT, WORKERS

CONFIG = f"""
backend: "python"
max_batch_size: {MAX_BATCH}
input [ {{ name: "photo", data_type: TYPE_STRING, dims: [ 1 ] }} ]
output [ {{ name: "mask", data_type: TYPE_STRING, dims: [ 1 ] }} ]
instance_group [ {{ count: {WORKERS}, kind: KIND_CPU }} ]
dynamic_batching {{ }}
"""

if __name__ == "__main__":
    triton = Path(pytriton.__file__).parent / "tritonserver"
    stub = "triton_python_backend_stub"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    source = triton / "python_backend_stubs" / version / stub
    target = triton / "backends" / "python" / stub
    if not target.exists():
        shutil.copy(source, target)
    here = Path(__file__).parent
    repository = Path(os.environ["PEER_FOLDER"])
    model = repository / "segment" / "1"
    model.mkdir(parents=True)
    (model.parent / "config.pbtxt").write_text(CONFIG)
    (model / "model.py").write_text(
        f"import sys\nsys.path[:0] = {[str(here), *sys.path]!r}\n"
        "from triton_model import TritonPythonModel\n"
    )
    binary = triton / "bin" / "tritonserver"
    libraries = f"{triton / 'lib'}:{triton / 'external_libs'}"
    os.execve(
        binary,
        [
            str(binary),
            f"--model-repository={repository}",
            f"--backend-directory={triton / 'backends'}",
            "--http-address=127.0.0.1",
            f"--http-port={PORT}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            "--log-info=false",
        ],
        {**os.environ, "LD_LIBRARY_PATH": libraries},
    )
