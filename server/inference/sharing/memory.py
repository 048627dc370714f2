"""The memory through which a feeder and the owner of the network hand each other photos."""

import fcntl
import mmap
import os

import numpy as np

from photos.image import MODEL_SIZE

__all__ = ["BULK_SLOTS", "INTERACTIVE_SLOTS", "Slots", "new_memory"]

INTERACTIVE_SLOTS = 128
"""Interactive photos that a feeder may have at the owner; more wait in the feeder."""

BULK_SLOTS = 64
"""The same for bulk photos. They have slots of their own, so that neither kind waits for the
other's."""

_PIXELS = (INTERACTIVE_SLOTS + BULK_SLOTS, MODEL_SIZE, MODEL_SIZE, 3)
_PIXELS_BYTES = int(np.prod(_PIXELS))
_BYTES = _PIXELS_BYTES + int(np.prod(_PIXELS[:3])) * 4


class Slots:
    """A feeder's slots: the interactive ones first, then those of bulk."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory that `new_memory` made."""
        memory = mmap.mmap(descriptor, _BYTES)
        self.pixels = np.ndarray(_PIXELS, np.uint8, memory)
        """uint8 [slots, 128, 128, 3]; the feeder writes."""
        self.probability = np.ndarray(_PIXELS[:3], np.float32, memory, _PIXELS_BYTES)
        """float32 [slots, 128, 128]; the owner writes."""


def new_memory() -> int:
    """Make the memory of one feeder, and return its file descriptor.

    It has no name that others could open, it goes with the last process that has it, and the system
    gives it pages only where it is written to. No process can shrink it under another.

    Raises:
        OSError: the system gives no memory.
    """
    descriptor = os.memfd_create("slsnet-slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, _BYTES)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor
