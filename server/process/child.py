"""What processes of a server have in common: signals, and an end that comes for certain."""

import ctypes
import logging
import os
import signal
import threading
from types import FrameType

from server.observe.logs import finish

__all__ = ["ALL_STOP", "end_after", "hold_signals", "outlives"]

log = logging.getLogger("slsnet.server")

ALL_STOP = signal.SIGUSR1
"""The signal that the whole server stops, or that its supervisor is gone. SIGTERM would not do: it
may be meant for one worker, while the others keep the port. And where the supervisor is gone the
kernel sends one for every thread that it had, but a second SIGTERM ends at once."""

# prctl(2): sets the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


def outlives(supervisor: int) -> bool:
    """Whether the supervisor is gone already; otherwise its end will be told by `ALL_STOP`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ALL_STOP)
    return os.getppid() != supervisor


def hold_signals() -> list[int]:
    """Keep signals until the server can handle them; by default they would end the process."""
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and {number, ALL_STOP} & set(held):
            os._exit(128 + number)
        held.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, ALL_STOP):
        signal.signal(number, hold)
    # They were blocked until something could keep them.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return held


def end_after(seconds: float) -> None:
    """End the process then, even if a thread never comes back, such as one in a driver."""
    backstop = threading.Timer(seconds, _end_at_last)
    backstop.daemon = True
    backstop.start()


def _end_at_last() -> None:
    log.error("something does not end: the process is ended")
    finish()
    os._exit(1)
