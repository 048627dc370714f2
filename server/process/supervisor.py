"""`--workers N`: several processes on one port, and a supervisor that does not serve itself.

They accept from one socket, so that a worker that crashes loses no waiting connection; a new worker
replaces it. SIGTERM drains all of them, after SIGHUP all load the network again. If the supervisor
is killed, the kernel tells the workers (prctl), and they drain and end. Metrics are in a shared
folder (`server.observe.shared_metrics`). It is hand-written because uvicorn's own supervisor knows
neither GPUs nor this folder.
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

from server.observe.shared_metrics import SHARED_FOLDER, WORKER, Folder
from server.settings import Settings

__all__ = ["supervise"]

log = logging.getLogger("slsnet.supervisor")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}

# Seconds before a worker is started again: doubled each time that it ends early.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_EARLY_S = 10.0

# Seconds until workers are killed: beyond the drain's own limits, at which a worker ends by itself,
# and after a second signal, which tells them to end at once.
_MARGIN_S = 7.0
_SECOND_SIGNAL_S = 2.0


@dataclass
class _Worker:
    """A worker: its process, or when to start the next one."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0
    pause_s: float = _FIRST_PAUSE_S
    due: float = 0
    code: int = 0

    def pause(self) -> float:
        """Set when to start it again; return the seconds until then."""
        now = time.monotonic()
        pause_s = _FIRST_PAUSE_S if now - self.started > _EARLY_S else self.pause_s
        self.due = now + pause_s
        self.pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s


def _its_gpu(number: int) -> dict[str, str]:
    """The GPU of a worker: those named in CUDA_VISIBLE_DEVICES are given out in turn.

    They are indices, or UUIDs of cards and MIG slices. A process uses the first that it sees.
    """
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": named[number % len(named)]} if named else {}


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
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._folder = folder
        self._longest_drain_s = settings.drain_grace_s + settings.drain_timeout_s + _MARGIN_S
        self._stopping = False
        self._kill_at = math.inf

    def run(self) -> int:
        """Run until all workers have ended; return the exit code."""
        try:
            while True:
                self._start_due()
                if all(worker.process is None for worker in self._workers):
                    if self._stopping:
                        return max(worker.code for worker in self._workers)
                    if all(worker.code in (1, 2) for worker in self._workers):
                        # They said what is wrong, and trying again would not help.
                        return self._workers[0].code
                self._wait()
                self._collect()
        finally:
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.kill()
            self._folder.remove()

    def _start_due(self) -> None:
        if self._stopping:
            return
        for worker in self._workers:
            if worker.process is None and time.monotonic() >= worker.due:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        listener, lock = self._listener.fileno(), self._folder.lock
        supervisor = str(os.getpid())
        # A worker starts with this thread's mask, and unblocks signals once it can handle them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._folder.reserve(worker.number)
            worker.process = subprocess.Popen(
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
                    **_its_gpu(worker.number),
                    SHARED_FOLDER: str(self._folder.path),
                    WORKER: str(worker.number),
                },
                pass_fds=[listener, lock],
                # A signal that a terminal sends to the whole group would count as a second one.
                start_new_session=True,
            )
        except OSError as error:
            # Memory, processes or files may be short now and free later.
            pause_s = worker.pause()
            log.error("no worker can be started, again in %g s: %s", pause_s, error)
        else:
            log.info("worker %d started", worker.process.pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _wait(self) -> None:
        """Wait until a signal comes, a worker is due to start, or workers are to be killed."""
        dues = [
            worker.due for worker in self._workers if worker.process is None and not self._stopping
        ]
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
        """Drain all workers, and kill those that do not end in time, or after a second signal."""
        patience_s = _SECOND_SIGNAL_S if self._stopping else self._longest_drain_s
        self._kill_at = min(self._kill_at, time.monotonic() + patience_s)
        if not self._stopping:
            # The workers hold the socket too; the last one to close it closes the port.
            self._listener.close()
            for worker in self._workers:
                if worker.process is None:
                    # The code of an earlier crash says nothing of this drain.
                    worker.code = 0
        self._stopping = True
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _kill(self) -> None:
        self._kill_at = math.inf
        for worker in self._workers:
            if worker.process is not None:
                log.error("worker %d does not end, it is killed", worker.process.pid)
                worker.process.kill()

    def _collect(self) -> None:
        for worker in self._workers:
            process = worker.process
            if process is None or process.poll() is None:
                continue
            self._folder.vacate(worker.number)
            worker.process = None
            worker.code = (
                process.returncode if process.returncode >= 0 else 128 - process.returncode
            )
            if self._stopping:
                continue
            pause_s = worker.pause()
            log.error(
                "worker %d ended with %d; another one starts in %g s",
                process.pid,
                process.returncode,
                pause_s,
            )


def supervise(settings: Settings, arguments: Sequence[str], listener: socket.socket) -> int:
    """Serve with `settings.workers` processes; return the exit code.

    Args:
        settings: the server's settings.
        arguments: the flags that they come from, for the workers.
        listener: the socket that the workers accept from.
    """
    # `_wait` reads signals one by one, so that none is missed. Blocking them would not do: they
    # would
    # reach the threads of libraries, and end the process.
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
        for worker in range(settings.workers):
            folder.reserve(worker)
    except OSError as error:
        log.error(_NO_ROOM, error)
        folder.remove()
        return 1
    return _Supervisor(settings, arguments, listener, told, folder).run()


_NO_ROOM = "no room for the workers' metrics in memory, look at /dev/shm: %s"
