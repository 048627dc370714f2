"""The stages of a request and their times: read, decode, queue, infer, encode."""

import time

__all__ = ["STAGES", "Stages"]

STAGES = ("read", "decode", "queue", "infer", "encode")
"""Stages in the order of a request's way. Together they take nearly all of its time."""


class Stages:
    """A stopwatch with a name for each lap, in the form of a `Server-Timing` header."""

    def __init__(self, started: float | None = None) -> None:
        """Started now, or at a second of `time.perf_counter`."""
        self.started = self._lap = time.perf_counter() if started is None else started
        self.seconds: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def end(self, stage: str, at: float | None = None) -> None:
        """End the stage that ran since the last call (now, or `at` by `perf_counter`)."""
        now = time.perf_counter() if at is None else at
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._lap
        self._lap = now

    def milliseconds(self) -> dict[str, float]:
        """The times of the stages that are over."""
        return {
            stage: round(self.seconds[stage] * 1000, 3) for stage in STAGES if stage in self.seconds
        }

    def header(self) -> str:
        """`Server-Timing` (W3C): the stages' milliseconds, and the total up to now."""
        total = (time.perf_counter() - self.started) * 1000
        return ", ".join(
            [
                *(f"{stage};dur={value}" for stage, value in self.milliseconds().items()),
                *(f'{name};desc="{text}"' for name, text in self.notes.items()),
                f"total;dur={total:.3f}",
            ]
        )
