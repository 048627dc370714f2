"""`--workers N`: several processes on one port, looked after by one that serves nothing itself.

They accept from one socket, so that what waits there is not lost with a worker that crashes; its
place is taken by a new one. SIGTERM drains all of them, SIGHUP has all of them load the network
again. If the supervisor itself is killed, the kernel tells the workers (prctl), and they drain and
end. Metrics are kept in a folder in memory that all share, and removed in the end.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead

from server.settings import Settings

__all__ = ["supervise"]

log = logging.getLogger("slsnet.supervisor")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}

# Pause before a worker's place is filled again: doubled each time that it ends early.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_EARLY_S = 10.0


@dataclass
class _Place:
    """Where a worker runs, or will run again."""

    worker: subprocess.Popen[bytes] | None = None
    started: float = 0
    pause_s: float = _FIRST_PAUSE_S
    due: float = 0
    code: int = 0


class _Supervisor:
    def __init__(
        self, settings: Settings, arguments: Sequence[str], listener: socket.socket
    ) -> None:
        self._arguments = arguments
        self._listener = listener
        self._places = [_Place() for _ in range(settings.workers)]
        memory = Path("/dev/shm")
        parent = memory if os.access(memory, os.W_OK) else None
        self._folder = tempfile.mkdtemp(prefix="slsnet-metrics-", dir=parent)
        self._stopping = False

    def run(self) -> int:
        """Until all workers have ended; gives the exit code."""
        try:
            while True:
                self._fill_places()
                if all(place.worker is None for place in self._places):
                    if self._stopping:
                        return max(place.code for place in self._places)
                    if all(place.code in (1, 2) for place in self._places):
                        # They said what is wrong, and it is not going to change.
                        return self._places[0].code
                self._wait()
                self._collect()
        finally:
            for place in self._places:
                if place.worker is not None:
                    place.worker.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _fill_places(self) -> None:
        if self._stopping:
            return
        for place in self._places:
            if place.worker is None and time.monotonic() >= place.due:
                self._start(place)

    def _start(self, place: _Place) -> None:
        place.started = time.monotonic()
        place.worker = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "server.worker",
                str(os.getpid()),
                str(self._listener.fileno()),
                *self._arguments,
            ],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": self._folder},
            pass_fds=[self._listener.fileno()],
            # What a terminal sends to all would count as a second signal.
            start_new_session=True,
        )
        log.info("worker %d started", place.worker.pid)

    def _wait(self) -> None:
        """Until a signal comes, or a place is to be filled again."""
        dues = [place.due for place in self._places if place.worker is None and not self._stopping]
        pause_s = max(0.0, min(dues) - time.monotonic()) if dues else 3600.0
        received = signal.sigtimedwait(_SIGNALS, pause_s)
        if received is None or received.si_signo == signal.SIGCHLD:
            return
        number = received.si_signo
        if number != signal.SIGHUP:
            if not self._stopping:
                # Theirs are enough, and the last to close its own closes the port.
                self._listener.close()
            self._stopping = True
            number = signal.SIGTERM
        for place in self._places:
            if place.worker is not None:
                with contextlib.suppress(ProcessLookupError):
                    place.worker.send_signal(number)

    def _collect(self) -> None:
        for place in self._places:
            worker = place.worker
            if worker is None or worker.poll() is None:
                continue
            mark_process_dead(worker.pid, self._folder)  # type: ignore[no-untyped-call]
            place.worker = None
            place.code = worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
            if self._stopping:
                continue
            now = time.monotonic()
            if now - place.started > _EARLY_S:
                place.pause_s = _FIRST_PAUSE_S
            place.due = now + place.pause_s
            log.error(
                "worker %d ended with %d; another one starts in %g s",
                worker.pid,
                worker.returncode,
                place.pause_s,
            )
            place.pause_s = min(2 * place.pause_s, _LONGEST_PAUSE_S)


def supervise(settings: Settings, arguments: Sequence[str], listener: socket.socket) -> int:
    """Serve with `settings.workers` processes; gives the exit code.

    Args:
        settings: all there is to set.
        arguments: the flags that they come from, for the workers.
        listener: accepts connections; the workers get it.
    """
    # Received one by one in `_wait`, so that none comes in between.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    return _Supervisor(settings, arguments, listener).run()
