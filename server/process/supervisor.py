"""`--workers N`: several processes on one port, and a supervisor that does not serve itself.

They accept from one socket, so that a worker that crashes loses no waiting connection; a new worker
replaces it. SIGTERM drains all of them, after SIGHUP all load the network again. If the supervisor
is killed, the kernel tells the workers (prctl), and they drain and end. Metrics are in a shared
folder (`server.observe.shared_metrics`). It is hand-written because uvicorn's own supervisor knows
neither GPUs nor this folder.

On a GPU, or where the settings say so, the workers share one network for each GPU. It has a process
of its own (`server.process.owner`), which is replaced in the same way. Its socket and the workers'
memory stay open here, so that those who are left find its successor.
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
from dataclasses import dataclass, field

from server.inference.sharing.feeder import Address
from server.inference.sharing.memory import new_memory
from server.observe.shared_metrics import SHARED_FOLDER, WORKER, Folder
from server.process.child import ALL_STOP
from server.settings import Settings

__all__ = ["shares", "sharing", "supervise"]

log = logging.getLogger("slsnet.supervisor")

_WORKER = "server.process.worker"
_OWNER = "server.process.owner"

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}

# Seconds before a worker is started again: doubled each time that it ends early.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_EARLY_S = 10.0

# Seconds until workers are killed: beyond the drain's own limits, at which a worker ends by itself,
# and after a second signal, which tells them to end at once.
_MARGIN_S = 7.0
_SECOND_SIGNAL_S = 2.0


# Seconds in which a process says whether a backend runs on a GPU.
_GPU_TIMEOUT_S = 60.0


@dataclass
class _Worker:
    """A worker or an owner: its process, or when to start the next one."""

    number: int
    module: str
    """What Python runs."""
    listener: socket.socket
    """What it accepts connections from."""
    sharing: str
    """What it is told of the network that it shares: see the mains of worker and owner."""
    files: Sequence[int] = ()
    """Descriptors that it inherits beside those that all do."""
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0
    pause_s: float = _FIRST_PAUSE_S
    due: float = 0
    code: int = 0

    @property
    def name(self) -> str:
        """What the log calls it."""
        return "worker" if self.module == _WORKER else "network's process"

    def pause(self) -> float:
        """Set when to start it again; return the seconds until then."""
        now = time.monotonic()
        pause_s = _FIRST_PAUSE_S if now - self.started > _EARLY_S else self.pause_s
        self.due = now + pause_s
        self.pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s


def _named_gpus() -> list[str]:
    """The GPUs named in CUDA_VISIBLE_DEVICES: indices, or UUIDs of cards and MIG slices."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def _its_gpu(number: int) -> dict[str, str]:
    """The GPU of a process: those named are given out in turn. It uses the first that it sees."""
    named = _named_gpus()
    return {"CUDA_VISIBLE_DEVICES": named[number % len(named)]} if named else {}


def shares(settings: Settings) -> bool:
    """Whether the workers share a network."""
    if settings.share_network != "auto":
        return settings.share_network == "yes"
    command = [sys.executable, "-m", "server.backends.gpu", settings.backend]
    try:
        asked = subprocess.run(command, timeout=_GPU_TIMEOUT_S, check=False, capture_output=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("each worker has its own network, since nobody knows of a GPU: %s", error)
        return False
    return asked.returncode == 0


def _alone(settings: Settings, listener: socket.socket) -> list[_Worker]:
    """Workers with a network each."""
    return [
        _Worker(number, _WORKER, listener, "", environment=_its_gpu(number))
        for number in range(settings.workers)
    ]


def sharing(
    settings: Settings, listener: socket.socket, folder: Folder
) -> tuple[list[_Worker], list[_Worker]]:
    """Workers, and the owners of the networks that they share.

    Raises:
        OSError: there is no memory for photos, or no room for a socket.
    """
    count = settings.workers
    owners, workers = [], []
    for gpu in range(min(count, len(_named_gpus()) or 1)):
        path = str(folder.path / f"network-{gpu}")
        way = socket.socket(socket.AF_UNIX)
        way.bind(path)
        way.listen(count)
        numbers = range(gpu, count, len(_named_gpus()) or 1)
        memories = [new_memory() for _ in numbers]
        for feeder, (number, memory) in enumerate(zip(numbers, memories, strict=True)):
            address = str(Address(path, memory, feeder))
            workers.append(_Worker(number, _WORKER, listener, address, [memory]))
        told = ",".join(map(str, memories))
        owners.append(_Worker(count + gpu, _OWNER, way, told, memories, _its_gpu(gpu)))
    return workers, owners


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        arguments: Sequence[str],
        listener: socket.socket,
        told: socket.socket,
        folder: Folder,
    ) -> None:
        """Plan the processes.

        Raises:
            OSError: there is no room for what they share.
        """
        self._arguments = arguments
        self._listener = listener
        self._told = told
        self._folder = folder
        workers, owners = (
            sharing(settings, listener, folder)
            if shares(settings)
            else (_alone(settings, listener), [])
        )
        self._workers = [*owners, *workers]
        self._essential = owners or workers
        """Where none of these can start, it is no use to go on."""
        for worker in self._workers:
            folder.reserve(worker.number)
        self._code = 0
        self._longest_drain_s = settings.drain_grace_s + settings.drain_timeout_s + _MARGIN_S
        self._stopping = False
        self._kill_at = math.inf

    def run(self) -> int:
        """Run until all workers have ended; return the exit code."""
        try:
            while True:
                self._start_due()
                if all(worker.process is None for worker in self._workers) and self._stopping:
                    return max(self._code, *(worker.code for worker in self._workers))
                if self._cannot_start() and not self._stopping:
                    self._code = self._essential[0].code
                    self._stop()
                    continue
                self._wait()
                self._collect()
        finally:
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.kill()
            self._folder.remove()

    def _cannot_start(self) -> bool:
        """Whether they said what is wrong, and trying again would not help."""
        return all(worker.process is None and worker.code in (1, 2) for worker in self._essential)

    def _start_due(self) -> None:
        if self._stopping:
            return
        for worker in self._workers:
            if worker.process is None and time.monotonic() >= worker.due:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        listener, lock = worker.listener.fileno(), self._folder.lock
        supervisor = str(os.getpid())
        # A worker starts with this thread's mask, and unblocks signals once it can handle them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_SIGNALS, ALL_STOP})
        try:
            self._folder.reserve(worker.number)
            worker.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    worker.module,
                    supervisor,
                    str(listener),
                    worker.sharing,
                    *self._arguments,
                ],
                env={
                    **os.environ,
                    **worker.environment,
                    SHARED_FOLDER: str(self._folder.path),
                    WORKER: str(worker.number),
                },
                pass_fds=[listener, lock, *worker.files],
                # A signal that a terminal sends to the whole group would count as a second one.
                start_new_session=True,
            )
        except OSError as error:
            # Memory, processes or files may be short now and free later.
            pause_s = worker.pause()
            log.error("no worker can be started, again in %g s: %s", pause_s, error)
        else:
            log.info("%s %d started", worker.name, worker.process.pid)
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
        first, self._stopping = not self._stopping, True
        self._send(ALL_STOP if first else signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _kill(self) -> None:
        self._kill_at = math.inf
        for worker in self._workers:
            if worker.process is not None:
                log.error("%s %d does not end, it is killed", worker.name, worker.process.pid)
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
            # With 0 it ends if it is asked to drain.
            log.log(
                logging.ERROR if worker.code else logging.INFO,
                "%s %d ended with %d; another one starts in %g s",
                worker.name,
                process.pid,
                process.returncode,
                pause_s,
            )


def supervise(
    settings: Settings, arguments: Sequence[str], listener: socket.socket, held: Sequence[int]
) -> int:
    """Serve with `settings.workers` processes; return the exit code.

    Args:
        settings: the server's settings.
        arguments: the flags that they come from, for the workers.
        listener: the socket that the workers accept from.
        held: signals that have come by now.
    """
    # `_wait` reads signals one by one, so that none is missed. Blocking them would not do: they
    # would reach the threads of libraries, and end the process.
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    # Workers start even so: a client may have connected, whom only they can answer. One that came
    # between these lines is both held and told: each counts once, since a second one kills.
    tell.send(bytes([*held, signal.SIGCHLD]))
    tell.send(bytes(set(told.recv(4096))))
    try:
        folder = Folder()
    except OSError as error:
        log.error(_NO_ROOM, error)
        return 1
    try:
        supervisor = _Supervisor(settings, arguments, listener, told, folder)
    except OSError as error:
        log.error(_NO_ROOM, error)
        folder.remove()
        return 1
    return supervisor.run()


_NO_ROOM = "no room for what the workers share in memory, look at /dev/shm: %s"
