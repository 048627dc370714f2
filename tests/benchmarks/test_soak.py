"""A short soak: too many requests, and then none."""

import pytest

from benchmarks.soak import soak


@pytest.mark.thorough
def test_overload_is_refused_and_nothing_grows() -> None:
    # Quicker than in half an hour the queue must fill, and slower than then memory settles.
    result = soak(10, overload=4)
    assert result.faults(memory=0.15, timely=False) == []
