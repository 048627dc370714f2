"""One photo that takes long does not keep others out for long."""

import contextlib

import pytest

from server.inference import admission
from server.inference.admission import Gate
from server.settings import Settings
from tests.server.inference.test_admission import Clock, is_let_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


def serve(
    gate: Gate, clock: Clock, seconds: float, *, photos: int = 1, served: bool = True
) -> None:
    """So many come together and each takes so long."""
    with contextlib.ExitStack() as stack:
        places = [
            stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))
            for _ in range(photos)
        ]
        for place in places:
            place.begin()
        for place in places:
            clock.now += seconds
            place.end(served=served)


@pytest.mark.parametrize("served", [True, False])
def test_one_outlier_does_not_shape_the_pace(clock: Clock, served: bool) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(40):
        serve(gate, clock, 0.02)
    serve(gate, clock, 16.0, served=served)
    for _ in range(40):
        with contextlib.ExitStack() as stack:
            # While one is worked on, another can be done within the second.
            place = stack.enter_context(gate.enter(deadline=clock.now + 30, bulk=False))
            place.begin()
            assert is_let_in(gate, clock, 1.0)
            clock.now += 0.02
            place.end(served=True)


def test_an_idle_server_forgets_a_bad_minute_in_seconds(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(12):
        serve(gate, clock, 1.0, photos=4)
    pace = gate.paces(bulk=False)[0]
    assert pace.seconds_each == pytest.approx(1.0)
    clock.now += 6
    assert pace.seconds_each < 0.05
    # And not because it is idle: those that come now find it so.
    serve(gate, clock, 0.02, photos=4)
    assert pace.seconds_each < 0.05


def test_a_server_that_stays_slow_is_known_to_be(clock: Clock) -> None:
    gate = Gate(Settings())
    gate.expect(0.02, 8)
    for _ in range(12):
        serve(gate, clock, 0.5, photos=4)
        clock.now += 0.05
    assert gate.paces(bulk=False)[0].seconds_each > 0.4
