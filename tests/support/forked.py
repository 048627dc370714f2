"""Starts servers by forking a process that has imported them: a second of CPU less for each.

Else they are what `python -m` starts. Only tests use it; benchmarks measure the real start.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import IO

from tests.support import ROOT

__all__ = ["Forked"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["server.process.worker", "server.backends.onnxruntime", __name__])


class Forked(subprocess.Popen[bytes]):
    """A process of which tests need not know that it was forked.

    Args:
        arguments: a Python interpreter, which is not started, `-m`, the module, and its flags.
        env: the server's environment.
        stdout: the file of what it writes, on standard error too.
    """

    def __init__(self, arguments: list[str], *, env: dict[str, str], stdout: IO[bytes]) -> None:
        # Not its own, which would start something.
        self.args = arguments
        self.stdin = self.stdout = self.stderr = None
        self.returncode = None
        self._process = _CONTEXT.Process(target=_run, args=(arguments[2:], env, stdout.name))
        # What runs the tests is not run again in the server, and the first one's process finds the
        # project. Only these two are put back: other threads may import and set others meanwhile.
        main, path = sys.modules["__main__"], os.environ.get("PYTHONPATH")
        sys.modules["__main__"] = ModuleType("__main__")
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
            del os.environ["PYTHONPATH"]
            if path is not None:
                os.environ["PYTHONPATH"] = path
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, sig: int) -> None:
        # It may have ended, and its exit code not have come yet.
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def __exit__(self, *_: object) -> None:
        self.wait()


def _run(module_and_flags: Sequence[str], environment: dict[str, str], output: str) -> None:
    """The whole life of a server."""
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.close(written)
    os.chdir(ROOT)
    sys.argv = list(module_and_flags)
    try:
        runpy.run_module(module_and_flags[0], run_name="__main__", alter_sys=True)
    finally:
        # multiprocessing ends its processes without.
        atexit._run_exitfuncs()
