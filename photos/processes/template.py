"""Forks a process for each file from one that has loaded the decoders already.

To load them takes a tenth of a second (AVIF, HEIC), half of one (pydicom) or two (highdicom), many
times as long as the work on a photo. `photos.processes.parent` runs this on Linux, with a socket
for its standard input. Each message there is a JSON document with a Python file and arguments for
its `main`, and three files: a socket for the new process alone, its input and its output. On that
socket this says `f` once the process is forked, or `m` if memory or files are too short for it, and
in the end its exit code (32 bits, signed, in the machine's order). If the other side of that socket
is shut, the process is killed.

It reads no photo itself. So nothing of a patient is in its memory, and what the work on one photo
does, none of the later ones sees. It ends with the process that started it, and the others with it.
"""

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import NoReturn

from photos.processes.child import main_of

__all__ = ["CODE", "FORKED", "NO_ROOM", "main"]

CODE = struct.Struct("=i")
"""How an exit code is told."""

FORKED, NO_ROOM = b"f", b"m"

_MESSAGE_BYTES = 65_536

# prctl(2): sets the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Fork until the socket ends."""
    return _Template().run()


def _main_of(file: str) -> Callable[[], int]:
    """Load a file: here, and so once for all. If that fails, the new process fails alone."""
    try:
        return main_of(file)
    except Exception:  # noqa: BLE001  # of whatever it imports
        return lambda: 1


class _Template:
    def __init__(self) -> None:
        self._asked = socket.socket(fileno=0)
        self._prctl = ctypes.CDLL(None).prctl
        self._ended, tell = socket.socketpair()
        self._files: list[socket.socket | selectors.DefaultSelector] = [self._ended, tell]
        for one in (self._ended, tell):
            one.setblocking(False)
        # It ends with its socket. Whoever ends a whole service, as systemd does, sends a signal to
        # each of its processes, and the server still answers what it has begun.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # A process that has ended is heard of through this socket.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.set_wakeup_fd(tell.fileno())
        self._processes: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._files.append(self._selector)

    def run(self) -> int:
        self._selector.register(self._asked, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)
        is_asked = True
        while is_asked or self._processes:
            for key, _ in self._selector.select():
                if key.fileobj is self._asked:
                    is_asked = self._fork()
                elif key.fileobj is self._ended:
                    self._ended.recv(4096)
                    self._collect()
                elif key.data in self._processes:
                    # Nobody waits for it any more.
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
        return 0

    def _fork(self) -> bool:
        """Start what the next message asks for; False if there is no more."""
        message, files, _, _ = socket.recv_fds(self._asked, _MESSAGE_BYTES, 3)
        if not message:
            self._selector.unregister(self._asked)
            return False
        process = socket.socket(fileno=files[0]) if files else None
        try:
            if process is not None:
                asked = json.loads(message)
                self._run(asked["file"], asked["arguments"], files[1:], process)
        finally:
            for file in files[1:]:
                os.close(file)
        return True

    def _run(
        self, file: str, arguments: list[str], pipes: list[int], process: socket.socket
    ) -> None:
        run = _main_of(file)
        # Else the first collection of each process would copy all of it.
        gc.collect()
        gc.freeze()
        said = NO_ROOM
        # Where files are short, not all have come.
        if len(pipes) == 2:
            with contextlib.suppress(OSError):
                pid = os.fork()
                if pid == 0:
                    self._become(run, arguments, pipes, process)
                self._processes[pid] = process
                self._selector.register(process, selectors.EVENT_READ, pid)
                said = FORKED
        with contextlib.suppress(BrokenPipeError):
            process.send(said)
        if said == NO_ROOM:
            process.close()

    def _become(
        self,
        run: Callable[[], int],
        arguments: list[str],
        pipes: list[int],
        process: socket.socket,
    ) -> NoReturn:
        """Be the new process from here on: of what this one has open it keeps nothing."""
        code = 1
        try:
            # Nobody else could end it then.
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for file, pipe in enumerate(pipes):
                os.dup2(pipe, file)
                os.close(pipe)
            for one in (*self._files, *self._processes.values(), process):
                one.close()
            sys.argv[1:] = arguments
            code = run()
            sys.stdout.flush()
        finally:
            os._exit(code)

    def _collect(self) -> None:
        """Tell the exit codes of processes that have ended."""
        while self._processes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            process = self._processes.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(process)
            with process, contextlib.suppress(BrokenPipeError):
                process.send(CODE.pack(os.waitstatus_to_exitcode(status)))
