"""The network's ONNX file is read once: the bytes that are checked and hashed are those loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.stamp import StampError, check_digest
from server.backends import BackendError

__all__ = ["ModelFile", "read_model"]


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
    try:
        content = model.read_bytes()
        check_digest(content)
    except OSError as error:
        raise BackendError(f"The server cannot load {model}: {error.strerror}") from error
    except StampError as error:
        raise BackendError(f"The server does not load {model}: {error}") from error
    return ModelFile(model, content, hashlib.sha256(content).hexdigest())
