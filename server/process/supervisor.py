"""`--workers N`: several processes on one port, looked after by one that serves nothing itself.

They accept from one socket, so that what waits there is not lost with a worker that crashes; its
place is taken by a new one. SIGTERM drains all of them, SIGHUP has all of them load the network
again. If the supervisor itself is killed, the kernel tells the workers (prctl), and they drain and
end. Metrics are kept in a folder in memory that all share (`server.observe.shared_metrics`).
"""

import contextlib
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from server.observe.shared_metrics import PLACE, SHARED_FOLDER, Folder
from server.settings import Settings

__all__ = ["supervise"]

log = logging.getLogger("slsnet.supervisor")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}

# Pause before a worker's place is filled again: doubled each time that it ends early.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_EARLY_S = 10.0

# Beyond the drain's own limits, at which a worker ends by itself, and once a second signal has told
# them to end at once.
_MARGIN_S = 7.0
_SECOND_SIGNAL_S = 2.0


@dataclass
class _Place:
    """Where a worker runs, or will run again."""

    number: int
    worker: subprocess.Popen[bytes] | None = None
    started: float = 0
    pause_s: float = _FIRST_PAUSE_S
    due: float = 0
    code: int = 0

    def pause(self) -> float:
        """Leave it empty for a while; gives the seconds."""
        now = time.monotonic()
        pause_s = _FIRST_PAUSE_S if now - self.started > _EARLY_S else self.pause_s
        self.due = now + pause_s
        self.pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s


def _its_gpu(place: int) -> dict[str, str]:
    """One of the GPUs named in CUDA_VISIBLE_DEVICES, in turn: indices, or UUIDs of cards and MIG
    slices. A process uses the first that it sees, and of MIG slices CUDA shows it one at most.
    """
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": named[place % len(named)]} if named else {}


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        arguments: Sequence[str],
        listener: socket.socket,
        told: socket.socket,
        folder: Folder,
    ) -> None:
        self._arguments = arguments
        self._listener = listener
        self._told = told
        self._places = [_Place(number) for number in range(settings.workers)]
        self._folder = folder
        self._longest_drain_s = settings.drain_grace_s + settings.drain_timeout_s + _MARGIN_S
        self._stopping = False
        self._kill_at = math.inf

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
            self._folder.remove()

    def _fill_places(self) -> None:
        if self._stopping:
            return
        for place in self._places:
            if place.worker is None and time.monotonic() >= place.due:
                self._start(place)

    def _start(self, place: _Place) -> None:
        place.started = time.monotonic()
        listener, lock = self._listener.fileno(), self._folder.lock
        supervisor = str(os.getpid())
        # A worker starts with the mask of this thread, and opens up once it can heed them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._folder.reserve(place.number)
            place.worker = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "server.process.worker",
                    supervisor,
                    str(listener),
                    *self._arguments,
                ],
                env={
                    **os.environ,
                    **_its_gpu(place.number),
                    SHARED_FOLDER: str(self._folder.path),
                    PLACE: str(place.number),
                },
                pass_fds=[listener, lock],
                # What a terminal sends to all would count as a second signal.
                start_new_session=True,
            )
        except OSError as error:
            # Memory, processes, files: what is short now may be there later.
            pause_s = place.pause()
            log.error("no worker can be started, again in %g s: %s", pause_s, error)
        else:
            log.info("worker %d started", place.worker.pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _wait(self) -> None:
        """Until a signal comes, a place is to be filled again, or patience ends."""
        dues = [place.due for place in self._places if place.worker is None and not self._stopping]
        pause_s = max(0.0, min([*dues, self._kill_at]) - time.monotonic())
        told, _, _ = select.select([self._told], [], [], min(pause_s, 3600.0))
        if time.monotonic() >= self._kill_at:
            self._kill()
        number = self._told.recv(1)[0] if told else signal.SIGCHLD
        if number == signal.SIGHUP:
            self._send(signal.SIGHUP)
        elif number != signal.SIGCHLD:
            self._stop()

    def _stop(self) -> None:
        """Have all workers drain; those who do not end in time, or once told again, are killed."""
        patience_s = _SECOND_SIGNAL_S if self._stopping else self._longest_drain_s
        self._kill_at = min(self._kill_at, time.monotonic() + patience_s)
        if not self._stopping:
            # Theirs are enough, and the last to close its own closes the port.
            self._listener.close()
            for place in self._places:
                if place.worker is None:
                    # Of one that crashed before: no word on this drain.
                    place.code = 0
        self._stopping = True
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for place in self._places:
            if place.worker is not None:
                with contextlib.suppress(ProcessLookupError):
                    place.worker.send_signal(number)

    def _kill(self) -> None:
        self._kill_at = math.inf
        for place in self._places:
            if place.worker is not None:
                log.error("worker %d does not end, it is killed", place.worker.pid)
                place.worker.kill()

    def _collect(self) -> None:
        for place in self._places:
            worker = place.worker
            if worker is None or worker.poll() is None:
                continue
            self._folder.vacate(place.number)
            place.worker = None
            place.code = worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
            if self._stopping:
                continue
            pause_s = place.pause()
            log.error(
                "worker %d ended with %d; another one starts in %g s",
                worker.pid,
                worker.returncode,
                pause_s,
            )


def supervise(settings: Settings, arguments: Sequence[str], listener: socket.socket) -> int:
    """Serve with `settings.workers` processes; gives the exit code.

    Args:
        settings: all there is to set.
        arguments: the flags that they come from, for the workers.
        listener: accepts connections; the workers get it.
    """
    # Read one by one in `_wait`, so that none comes in between. Not blocked: they would reach the
    # threads of libraries, and end the process.
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    try:
        folder = Folder()
    except OSError as error:
        log.error(_NO_ROOM, error)
        return 1
    try:
        for place in range(settings.workers):
            folder.reserve(place)
    except OSError as error:
        log.error(_NO_ROOM, error)
        folder.remove()
        return 1
    return _Supervisor(settings, arguments, listener, told, folder).run()


_NO_ROOM = "no room for the workers' metrics in memory, look at /dev/shm: %s"
