"""The server with a stub in its network's place: `python -m benchmarks.peers.slsnet FLAGS`.

It is the stub that the peers run too, behind this server's interface for backends. Everything else
is the server with its defaults. `PEER_NETWORK` says how long a run takes; with `copies` it is a
backend that costs the host what a GPU's does (`benchmarks.path.Copies`).
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.path import Copies
from benchmarks.peers.servers import handler
from server.__main__ import main
from server.backends import Backend, BackendInfo, Images
from server.inference import loading
from server.observe.shared_metrics import SHARED_FOLDER
from server.process import owner, supervisor, worker


class StubBackend:
    """A backend that finds a disc, after a while."""

    def __init__(self) -> None:
        self._run = handler.load()

    def describe(self) -> BackendInfo:
        return BackendInfo("stub", "1", "cpu", "fp32", max_batch=handler.MAX_BATCH)

    def warm_up(self) -> None:
        self.infer(np.zeros((1, handler.SIDE, handler.SIDE, 3), np.uint8))

    def infer(self, batch: Images) -> NDArray[np.float32]:
        probability: NDArray[np.float32] = self._run(np.asarray(batch))
        return probability

    def close(self) -> None:
        pass


def _open_stub(*_: object, **__: object) -> Backend:
    return Copies() if handler.NETWORK == "copies" else StubBackend()


class _Popen(subprocess.Popen[bytes]):
    """Starts the supervisor's processes through this module too."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        if command[1] == "-m" and command[2] in _MAINS:
            command = [*command[:2], __spec__.name, *command[2:]]
        super().__init__(command, **options)


_MAINS = {"server.process.worker": worker.main, "server.process.owner": owner.main}


if __name__ == "__main__":
    loading.open_backend = _open_stub  # type: ignore[attr-defined]
    if SHARED_FOLDER in os.environ:
        sys.exit(_MAINS[sys.argv.pop(1)]())
    supervisor.subprocess.Popen = _Popen  # type: ignore[attr-defined]
    sys.exit(main())
