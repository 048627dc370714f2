"""What photos cost on their way to a shared network: real processes, and the tables."""

from benchmarks import feeders, ring
from tests.support.lesions import drawn_photo


def test_photos_pass_from_feeders_through_the_owner_and_back() -> None:
    part = ring.measure(2, clients=4, seconds=0.1)
    assert part.photos_per_s > 0
    assert part.photos_a_run >= 1
    assert part.feeder_us > 0
    assert part.owner_us >= part.loop_us > 0


def test_the_owner_is_held_against_one_process() -> None:
    alone, shared = ring.Part(5000, 32, 60, 0, 25), ring.Part(4000, 16, 40, 50, 40)
    table = ring.table({0: [alone], 2: [shared, shared]})
    assert table.splitlines()[2] == "| one process | 5,000 | 32 | 60 | – | 25 | 40,000 |"
    assert table.splitlines()[3] == "| 2 | 4,000 | 16 | 40 | 50 | 40 | 25,000 |"


def test_throughput_of_16_cores_leaves_out_decoding() -> None:
    rounds = {
        "one process": [feeders.Round(500, 1800, 0)],
        "2 feeders": [feeders.Round(900, 1500, 50), feeders.Round(1000, 1500, 50)],
    }
    rows = feeders.table(rounds, decoding_us=800).splitlines()[2:]
    assert rows == [
        "| one process | 500 | 1800 | – | 1800 | 1000 | 16,000 |",
        "| 2 feeders | 950 | 1500 | 50 | 1550 | 750 | 21,333 |",
    ]


def test_decoding_takes_time() -> None:
    assert feeders.decode_us(drawn_photo(0, 64, 48), turns=3) > 0
