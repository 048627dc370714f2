"""A server whose workers load no network while a file is there, as if that took long.

Run as `python -m tests.support.slow_workers FLAGS…`, with the file's path in `HOLD`.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from server.__main__ import main
from server.backends import Backend, open_backend
from server.inference import loading
from server.observe.shared_metrics import WORKER
from server.process import supervisor, worker

_HOLD = Path(os.environ["HOLD"])


def _open(*arguments: Any, **options: Any) -> Backend:
    while _HOLD.exists():
        time.sleep(0.01)
    return open_backend(*arguments, **options)


if __name__ == "__main__":
    if WORKER in os.environ:
        loading.open_backend = _open  # type: ignore[attr-defined]
        # What one waits for is another that can answer, and not the time.
        worker._FIRST_LOAD_S = 0.0
        sys.exit(worker.main())
    supervisor._WORKER = "tests.support.slow_workers"
    sys.exit(main())
