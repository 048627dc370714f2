"""Cores and cost follow from the table of latency."""

import pytest

from benchmarks.sizing import Cost, Prices, read_costs, tables
from tests.support import ROOT

MEASURED = ROOT / "docs/benchmarks.md"

LATENCY = """
| photo | JPEG, MB | whole | read | queue | infer | not the network | of the whole |
|---|---|--:|--:|--:|--:|--:|--:|
| 600×450 | 0.1 | 50.0 | 1.0 | 0.1 | 40.0 | **10.0** | 20% |

| batching | whole | queue |
|---|--:|--:|
| on | 97.08 | 0.11 |
"""


def test_reads_the_table_of_latency() -> None:
    assert read_costs(LATENCY) == [Cost("600×450", 50.0, 10.0)]


def test_cores_and_costs_equal_those_computed_by_hand() -> None:
    prices = Prices(core=0.036, gpu=3.6, gpu_cores=10, use=0.5)
    sizing, cost = tables(read_costs(LATENCY), photos_per_s=70, prices=prices).split("\n\n")
    # 20 and 100 photos/s a core; 70 / 20 / 0.7 = 5 cores, 70 / 100 / 0.7 = 1.
    assert sizing.splitlines()[-1] == "| 600×450 | 50.0 | 20.0 | 10.0 | 100 | 5.0 | 1.0 |"
    # 50,000 core seconds are 13.9 h, for 0.50 $; ten cores do 1000/s, which is 0.28 h for 1 $.
    assert cost.splitlines()[-1] == "| 600×450 | 13.9 | 0.50 | 1.00 | 1000 | 0.28 | 1.00 | 2.00 |"


def test_a_file_without_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table"):
        read_costs("# Nothing")


def test_readme_has_the_table() -> None:
    assert read_costs(MEASURED.read_text(encoding="utf-8"))
