"""What tests and benchmarks share: servers to start, photos to send, stand-ins for hardware."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "model/weights/slsnet.onnx"
