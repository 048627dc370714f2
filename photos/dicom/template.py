"""Forks a process for each DICOM object from one that has loaded the libraries already.

To load them takes half a second (pydicom) or two (highdicom), many times as long as the work on a
photo. `photos.dicom.process` runs this on Linux, with a socket for its standard input. Each message
there is a JSON document with a module and arguments for its `main`, and three files: the new
process's input and output, and a socket of its own. On that socket this says `f` once the process
is forked, or `m` if there is no memory for it, and in the end its exit code (32 bits, signed, in
the machine's order). If the other side of that socket is shut, the process is killed.

It reads no object itself. So nothing of a patient is in its memory, and what the work on one object
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
from importlib import import_module
from typing import NoReturn

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


class _Template:
    def __init__(self) -> None:
        self._asked = socket.socket(fileno=0)
        self._prctl = ctypes.CDLL(None).prctl
        self._ended, tell = socket.socketpair()
        self._files: list[socket.socket | selectors.DefaultSelector] = [self._ended, tell]
        for one in (self._ended, tell):
            one.setblocking(False)
        # A process that has ended is heard of through this socket.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(tell.fileno())
        self._processes: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._files.append(self._selector)

    def run(self) -> int:
        self._selector.register(self._asked, selectors.EVENT_READ)
        self._selector.register(self._ended, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._asked:
                    if not self._fork():
                        return 0
                elif key.fileobj is self._ended:
                    self._ended.recv(4096)
                    self._collect()
                elif key.data in self._processes:
                    # Nobody waits for it any more.
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self) -> bool:
        """Start what the next message asks for; False if there is no more."""
        message, files, _, _ = socket.recv_fds(self._asked, _MESSAGE_BYTES, 3)
        if not message:
            return False
        taken, given, told = files
        asked = json.loads(message)
        # Loaded here, and so once for all.
        run = import_module(asked["module"]).main
        # Else the first collection of each process would copy all of it.
        gc.collect()
        gc.freeze()
        with socket.socket(fileno=told) as process:
            try:
                pid = os.fork()
            except OSError:
                process.send(NO_ROOM)
            else:
                if pid == 0:
                    self._become(run, asked["arguments"], taken, given, process)
                kept = process.dup()
                self._processes[pid] = kept
                self._selector.register(kept, selectors.EVENT_READ, pid)
                with contextlib.suppress(BrokenPipeError):
                    kept.send(FORKED)
        os.close(taken)
        os.close(given)
        return True

    def _become(
        self,
        run: Callable[[], int],
        arguments: list[str],
        taken: int,
        given: int,
        process: socket.socket,
    ) -> NoReturn:
        """Be the new process from here on: of what this one has open it keeps nothing."""
        code = 1
        try:
            # Nobody else could end it then.
            self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(taken, 0)
            os.dup2(given, 1)
            os.close(taken)
            os.close(given)
            for one in (*self._files, *self._processes.values(), process):
                one.close()
            sys.argv[1:] = arguments
            code = run()
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
