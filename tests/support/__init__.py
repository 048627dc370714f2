"""What tests and benchmarks share: servers to start, photos to send, stand-ins for hardware."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "model/weights/slsnet.onnx"


def python_files(room: str) -> list[Path]:
    """The Python files of a folder of the project, without those of environments made in it."""
    return [
        path
        for path in sorted((ROOT / room).rglob("*.py"))
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
