"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object]) -> None:
    """Wait for it, and not for ever."""
    give_up = time.perf_counter() + 600
    while not condition():
        assert time.perf_counter() < give_up
        time.sleep(0.02)
