"""The network's ONNX file, read once: what is checked and hashed is what is loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.stamp import StampError, check_digest
from server.backends import BackendError

__all__ = ["ModelFile", "read_model"]


@dataclass(frozen=True)
class ModelFile:
    """A file's bytes, and which they are."""

    path: Path
    content: bytes
    sha256: str


def read_model(model: Path) -> ModelFile:
    """The file's bytes, held against the digest that they have (`common.stamp`).

    Raises:
        BackendError: it cannot be read, or is not what its digest was made of.
    """
    try:
        content = model.read_bytes()
        check_digest(content)
    except OSError as error:
        raise BackendError(f"The server cannot load {model}: {error.strerror}") from error
    except StampError as error:
        raise BackendError(f"The server does not load {model}: {error}") from error
    return ModelFile(model, content, hashlib.sha256(content).hexdigest())
