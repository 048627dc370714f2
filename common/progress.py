"""Progress of a long command on stderr; of several processes only the first writes."""

import os
import sys

__all__ = ["TELL_EVERY_S", "say", "tell"]

TELL_EVERY_S = 10.0
"""After its first step a command tells its progress at most this often."""


def say(what: str) -> None:
    """Write a line."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(what, file=sys.stderr, flush=True)


def tell(what: str, left_s: float) -> None:
    """Write a line of progress, with the time that is left."""
    minutes, seconds = divmod(int(left_s), 60)
    say(f"{what} left {minutes}:{seconds:02d}")
