"""The servers of the comparison: how a request is made for each, and how its answer is read."""

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.client import post

OURS = "slsnet"
"""This server, with its defaults."""

_QUIET = ("--log-level", "warning")


def _bare(photo: bytes) -> bytes:
    return post("/segment", photo, {"Content-Type": "image/jpeg"})


def _litserve(photo: bytes) -> bytes:
    """Wrap the photo in a form, since LitServe takes only forms and JSON."""
    boundary = "peers-boundary-5c4b1f"
    head = (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="photo"; filename="photo"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + photo + f"\r\n--{boundary}--\r\n".encode()
    return post("/predict", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})


def _mosec(photo: bytes) -> bytes:
    return post("/inference", photo, {"Content-Type": "image/jpeg"})


def _torchserve(photo: bytes) -> bytes:
    return post("/predictions/segment", photo, {"Content-Type": "image/jpeg"})


def _triton(photo: bytes) -> bytes:
    """Wrap the photo in the binary tensor extension, where a string's length comes before it."""
    data = struct.pack("<I", len(photo)) + photo
    wanted = {"name": "mask", "parameters": {"binary_data": True}}
    tensor = {
        "name": "photo",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return post("/v2/models/segment/infer", head + data, headers)


def _triton_mask(body: bytes) -> bytes:
    # The JSON's length is in a header. The mask begins at PNG's signature.
    return body[body.index(b"\x89PNG") :]


def _mlserver(photo: bytes) -> bytes:
    tensor = {
        "name": "photo",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(photo).decode()],
    }
    body = json.dumps({"inputs": [tensor]}).encode()
    return post("/v2/models/segment/infer", body, {"Content-Type": "application/json"})


def _mlserver_mask(body: bytes) -> bytes:
    return base64.b64decode(json.loads(body)["outputs"][0]["data"][0])


@dataclass(frozen=True)
class Entrant:
    """One server of the comparison."""

    name: str
    label: str
    """Its name in the report."""
    settings: str
    """Settings beyond those that all have, as the server's documentation recommends or shows."""
    package: str = ""
    """The package whose version is the server's version."""
    source: str = ""
    """Address of the documentation with these settings."""
    environment: str = ""
    """Name of the requirements; empty means this server's own Python."""
    script: str = ""
    """Name of the script in `servers/`."""
    flags: tuple[str, ...] = ()
    """Flags for this server's own command line."""
    ask: Callable[[bytes], bytes] = _bare
    """Turns a photo into the whole request."""
    mask: Callable[[bytes], bytes] = bytes
    """Turns an answer's body into the PNG in it."""
    batches: bool = True
    waits: bool = False
    """Whether a batch waits some milliseconds, as configured, for more photos."""
    is_python: bool = True
    """Whether the front end is written in Python."""
    needs: str = ""
    """A program that the server needs besides Python."""
    stubs: bool = True
    """Whether a stub in the network's place tells anything about the server."""
    one_process: bool = False
    """Whether one process runs the network with the threads of all."""

    @property
    def is_ours(self) -> bool:
        """Whether this is the server that the others are compared with."""
        return not self.environment

    @property
    def requirements(self) -> Path:
        """File of the server's pinned packages."""
        return Path(__file__).parent / "requirements" / f"{self.environment}.txt"

    @property
    def version(self) -> str:
        """Version of the server's package, as pinned."""
        if self.is_ours:
            return ""
        pins = self.requirements.read_text(encoding="utf-8").splitlines()
        return next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{self.package}=="))


ENTRANTS = (
    Entrant(
        OURS,
        "**this server**",
        "`--log-level warning`, as no peer logs requests; else as it comes",
        flags=_QUIET,
    ),
    Entrant(
        "slsnet-openvino",
        "this server, OpenVINO",
        "the same, `--backend openvino`, where the processor multiplies bfloat16",
        flags=(*_QUIET, "--backend", "openvino"),
        stubs=False,
    ),
    Entrant(
        "fastapi",
        "FastAPI + ONNX Runtime",
        "uvicorn workers; no batching",
        "fastapi",
        "https://fastapi.tiangolo.com/deployment/server-workers/",
        "fastapi",
        "fastapi_app.py",
        batches=False,
    ),
    Entrant(
        "fastapi-wide",
        "FastAPI, one process with all threads",
        "one uvicorn worker; no batching",
        "fastapi",
        "https://fastapi.tiangolo.com/deployment/server-workers/",
        "fastapi",
        "fastapi_app.py",
        batches=False,
        stubs=False,
        one_process=True,
    ),
    Entrant(
        "litserve",
        "LitServe",
        "`batch_timeout=0.01`, `fast_queue=True`",
        "litserve",
        "https://lightning.ai/docs/litserve/features/batching",
        "litserve",
        "litserve_app.py",
        waits=True,
        ask=_litserve,
    ),
    Entrant(
        "mosec",
        "mosec",
        "`max_wait_time=10`",
        "mosec",
        "https://mosecorg.github.io/mosec/reference/interface.html",
        "mosec",
        "mosec_app.py",
        waits=True,
        ask=_mosec,
        is_python=False,
    ),
    Entrant(
        "triton",
        "Triton core + Python backend",
        "`dynamic_batching { }`: no delay",
        "nvidia-pytriton",
        "https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/batcher.html",
        "triton",
        "triton_app.py",
        ask=_triton,
        mask=_triton_mask,
        is_python=False,
    ),
    Entrant(
        "bentoml",
        "BentoML",
        "adaptive batching in a service of its own, `workers`",
        "bentoml",
        "https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html",
        "bentoml",
        "bentoml_app.py",
    ),
    Entrant(
        "ray",
        "Ray Serve",
        "`serve.batch` with its `batch_wait_timeout_s=0.01`",
        "ray",
        "https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html",
        "ray",
        "ray_app.py",
        waits=True,
    ),
    Entrant(
        "mlserver",
        "MLServer",
        "`max_batch_time=0.01`, `parallel_workers`",
        "mlserver",
        "https://docs.seldon.ai/mlserver/user-guide/adaptive-batching",
        "mlserver",
        "mlserver_app.py",
        waits=True,
        ask=_mlserver,
        mask=_mlserver_mask,
    ),
    Entrant(
        "torchserve",
        "TorchServe",
        "`maxBatchDelay: 10`, `job_queue_size=256`",
        "torchserve",
        "https://pytorch.org/serve/batch_inference_with_ts.html",
        "torchserve",
        "torchserve_app.py",
        waits=True,
        ask=_torchserve,
        is_python=False,
        needs="java",
    ),
)
