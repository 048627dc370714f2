"""The container's first process: the server, which can be stopped from its first moment on.

The kernel drops a signal that process 1 has no handler for. Until the server has set its own, a
stop would go unheard and end, after the engine's patience, in a kill.
"""

import runpy
import signal
import sys
from types import FrameType


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    runpy.run_module("server", run_name="__main__", alter_sys=True)
