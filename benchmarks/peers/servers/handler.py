"""The code around the network that every peer's user writes: decode, run, encode.

It runs in the peers' own environments. It needs numpy, Pillow and, for a real network, ONNX
Runtime.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PORT = int(os.environ.get("PEER_PORT", "8000"))
NETWORK = os.environ.get("PEER_NETWORK", "stub:0")
"""An ONNX file, or `stub:` and the milliseconds that one run takes."""
WORKERS = int(os.environ.get("PEER_WORKERS", "1"))
"""Number of processes that run the network."""
THREADS = int(os.environ.get("PEER_THREADS", "1"))
"""Number of threads in each of these processes, for one run."""
DEVICE = os.environ.get("PEER_DEVICE", "/tmp/peer-device.lock")
"""File that stands for the one device that a stub runs on."""
MAX_BATCH = 8
TIMEOUT_S = 60
"""Time limit of one request, where a peer has such a limit."""
SIDE = 128
THRESHOLD = 0.5

Network = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [n, 128, 128, 3] RGB → probability, float32 [n, 128, 128]."""


def decode(data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A photo's bytes → uint8 [128, 128, 3], and the photo's width and height."""
    image = Image.open(BytesIO(data)).convert("RGB")
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small), image.size


def encode(probability: NDArray[np.float32], size: tuple[int, int]) -> bytes:
    """Probability [128, 128] → a PNG mask of the photo's width and height."""
    mask = Image.fromarray((probability > THRESHOLD).astype(np.uint8) * 255)
    buffer = BytesIO()
    mask.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def load(network: str = NETWORK, threads: int = THREADS) -> Network:
    """The network of this name, ready to run."""
    if network.startswith("stub:"):
        return stub(float(network.removeprefix("stub:")) / 1000)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])

    def run(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        probability: NDArray[np.float32] = session.run(["probability"], {"image": batch})[0]
        return probability

    run(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    return run


def stub(seconds: float) -> Network:
    """A network that takes so long for a batch of any size, with hardly any work.

    It finds a disc, larger for a brighter photo. All processes take turns on one device, as they
    would on one accelerator.
    """
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    nearness = (1 - np.hypot(x, y)).astype(np.float32)

    def run(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        if seconds:
            with _device():
                time.sleep(seconds)
        brightness = batch.mean(axis=(1, 2, 3), dtype=np.float32)[:, None, None] / 255
        probability: NDArray[np.float32] = np.clip(nearness - 0.4 + 0.3 * brightness, 0, 1)
        return probability

    return run


@contextlib.contextmanager
def _device() -> Iterator[None]:
    # A file of its own for each turn: threads of one process exclude each other, too.
    with open(DEVICE, "w") as device:  # noqa: PTH123
        fcntl.flock(device, fcntl.LOCK_EX)
        yield
