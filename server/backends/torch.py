"""PyTorch: the reference for the exported graph. Only this backend needs torch."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from model.export import AttentionForm, Contract, set_attention
from model.generator import Generator, load_metadata
from model.networks import read_network
from photos.image import MODEL_SIZE
from server.backends import BackendError, BackendInfo, Images

__all__ = ["TorchBackend"]

_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_CPU_MAX_BATCH = 8
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Lane:
    """A batch size whose work is recorded as a CUDA graph."""

    image: torch.Tensor
    probability: torch.Tensor
    graph: Any


class TorchBackend:
    """Runs the network itself, on the GPU if there is one.

    Args:
        model: the ONNX file; the weights lie beside it as `.safetensors`. If the ONNX file exists,
            it tells the form of attention; otherwise that is exact, as trained.
        precision: precision of autocast; channel attention's energies are float32 in any.
        run: on a GPU `graph` records one CUDA graph for each bucket. `compile` is `torch.compile`,
            which takes minutes and answers only in the thread that first called. `eager` is plain.

    Raises:
        BackendError: the weights are missing, or belong to another network.
    """

    def __init__(
        self,
        model: Path,
        *,
        precision: Literal["fp32", "fp16", "bf16"] = "fp32",
        run: Literal["eager", "graph", "compile"] = "graph",
    ) -> None:
        weights = model.with_suffix(".safetensors")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            read = read_network(weights)
            form: dict[str, str] = {}
            if isinstance(read, Generator):
                attention = _attention(model, read)
                set_attention(read, attention)
                form["attention"] = attention
            network = Contract(read).eval().to(self._device)
            self._sha256 = sha256(weights.read_bytes()).hexdigest()
            self._metadata = {
                **load_metadata(weights),
                **form,
                "weights_sha256": self._sha256,
            }
        except (OSError, ValueError, DecodeError) as error:
            raise BackendError(f"PyTorch cannot load {weights}: {error}") from error
        self._precision = precision
        self._graphs = run == "graph" and self._device.type == "cuda"
        self._network = network
        if run == "compile":
            network.compile(mode="reduce-overhead", dynamic=False)
        self._lock = Lock()
        self._lanes: dict[int, _Lane] = {}

    def describe(self) -> BackendInfo:
        on_gpu = self._device.type == "cuda"
        return BackendInfo(
            name="torch",
            version=str(torch.__version__),
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            precision=self._precision,
            max_batch=_BUCKETS[-1] if on_gpu else _CPU_MAX_BATCH,
            buckets=_BUCKETS if self._graphs else (),
            model=self._metadata,
            file_sha256=self._sha256,
        )

    def warm_up(self) -> None:
        for bucket in _BUCKETS if self._graphs else (1,):
            self.infer(np.zeros((bucket, MODEL_SIZE, MODEL_SIZE, 3), np.uint8))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        try:
            with self._lock, torch.inference_mode():
                if self._graphs and len(batch) <= _BUCKETS[-1]:
                    return self._replay(batch)
                image = torch.from_numpy(np.ascontiguousarray(batch)).to(self._device)
                return self._forward(image).cpu().numpy()
        except RuntimeError as error:  # torch's out-of-memory and CUDA errors among them
            raise BackendError(f"PyTorch failed on a batch of {len(batch)}: {error}") from error

    def close(self) -> None:
        self._lanes.clear()
        del self._network

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self._device.type,
            _TYPES[self._precision],
            enabled=self._precision != "fp32",
            # A weight cast once and kept would be freed under a recorded graph.
            cache_enabled=False,
        )

    def _forward(self, image: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            probability: torch.Tensor = self._network(image)
        return probability.float()

    def _replay(self, batch: Images) -> NDArray[np.float32]:
        bucket = next(size for size in _BUCKETS if size >= len(batch))
        if bucket not in self._lanes:
            self._lanes[bucket] = self._record(bucket)
        lane = self._lanes[bucket]
        lane.image[: len(batch)].copy_(torch.from_numpy(np.ascontiguousarray(batch)))
        lane.graph.replay()
        return lane.probability[: len(batch)].cpu().numpy()

    def _record(self, bucket: int) -> _Lane:
        image = torch.zeros(
            (bucket, MODEL_SIZE, MODEL_SIZE, 3), dtype=torch.uint8, device=self._device
        )
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # In the first runs libraries choose kernels and allocate, which cannot be recorded.
            for _ in range(3):
                self._forward(image)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            probability = self._forward(image)
        return _Lane(image, probability, graph)


def _attention(model: Path, generator: Generator) -> AttentionForm:
    """The form of attention in an exported file; exact if there is no file."""
    if generator.config.pam_pool[0] > 1:
        return "pooled"
    said = onnx.load(model).metadata_props if model.exists() else ()
    return "pooled" if any((e.key, e.value) == ("attention", "pooled") for e in said) else "exact"
