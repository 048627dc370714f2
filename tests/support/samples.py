"""Photos with their true masks, as tests send them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """A photo as a client sends it, with its true mask (bool [height, width])."""

    name: str
    data: bytes
    mask: NDArray[np.bool_]
