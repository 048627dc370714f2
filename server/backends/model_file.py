"""The network's ONNX file is read once: the bytes that are checked and hashed are those loaded.

The table of its masks' quality and the detector of other pictures lie beside it, and have to belong
to the same weights.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.stamp import StampError, check_digest
from photos.fitness import Detector
from photos.quality import QualityTable
from server.backends import BackendError

__all__ = ["ModelFile", "read_detector", "read_model", "read_quality"]

Beside = TypeVar("Beside", QualityTable, Detector)


@dataclass(frozen=True)
class ModelFile:
    """The bytes of a file, and what identifies them."""

    path: Path
    content: bytes
    sha256: str


def read_model(model: Path) -> ModelFile:
    """Read the file, and compare its bytes with the digest in them (`common.stamp`).

    Raises:
        BackendError: the file cannot be read, or its digest was made of other content.
    """
    if model.exists() and not model.is_file():
        # A pipe would keep the server waiting, and a device has no end.
        raise BackendError(f"The server cannot load {model}: it is no file")
    try:
        content = model.read_bytes()
        check_digest(content)
    except OSError as error:
        raise BackendError(f"The server cannot load {model}: {error.strerror}") from error
    except StampError as error:
        raise BackendError(f"The server does not load {model}: {error}") from error
    return ModelFile(model, content, hashlib.sha256(content).hexdigest())


def read_quality(model: Path, card: Mapping[str, str]) -> QualityTable | None:
    """Read the table of quality beside a network's file.

    Args:
        model: the network's file, `X.onnx`; the table is `X.quality.json`.
        card: its metadata.

    Returns:
        The table; None if there is none, or if the network does not say which weights it has.

    Raises:
        BackendError: it cannot be read, or belongs to other weights.
    """
    return _read_beside(model, card, "quality", QualityTable.parse)


def read_detector(model: Path, card: Mapping[str, str]) -> Detector | None:
    """Read the detector of other pictures, `X.fitness.json`; for the rest see `read_quality`."""
    return _read_beside(model, card, "fitness", Detector.parse)


def _read_beside(
    model: Path, card: Mapping[str, str], kind: str, parse: Callable[[bytes], Beside]
) -> Beside | None:
    path = model.with_suffix(f".{kind}.json")
    weights = card.get("weights_sha256")
    try:
        found = parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BackendError(f"The server cannot load {path}: {error.strerror}") from error
    except ValueError as error:
        raise BackendError(f"The server does not load {path}: {error}") from error
    if weights is None:
        return None
    if weights != found.weights_sha256:
        raise BackendError(
            f"{path} belongs to the weights {found.weights_sha256[:12]}…, {model} has"
            f" {weights[:12]}…: make it anew with `python -m model.{kind}`, or remove it."
        )
    return found
