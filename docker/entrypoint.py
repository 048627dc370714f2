"""The container's first process: the server, which can be stopped from its first moment on.

The kernel drops a signal that process 1 has no handler for. Until the server has set its own, a
stop would go unheard and end, after the engine's patience, in a kill.

Two other programs run as well where the image has their packages: `archive …` is
`python -m server.archive …`, and `label-studio …` is `python -m slsnet_client.label_studio …`.
"""

import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

_OTHERS = {"archive": "server.archive", "label-studio": "slsnet_client.label_studio"}


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    program = _OTHERS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if program:
        del sys.argv[1]
        sys.path.append(str(Path(__file__).parent / "client"))
    runpy.run_module(program or "server", run_name="__main__", alter_sys=True)
