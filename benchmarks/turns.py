"""Two ways that are measured in turn, so that the rest of the machine's work meets both alike."""

import statistics
from collections.abc import Callable, Sequence


def compared(
    first: Callable[[], Sequence[float]], second: Callable[[], Sequence[float]], turns: int
) -> list[str]:
    """Measure both in turn, once more than `turns`, and make a table's cells of each figure.

    Each has the median of the first, that of the second, and the median of the turns' own ratios,
    second / first.

    Args:
        first: measures once; its figures come in the order of the cells.
        second: the same for the other way.
        turns: number of turns that the medians are of; the first one only warms up.
    """
    measured: list[tuple[Sequence[float], Sequence[float]]] = []
    for turn in range(turns + 1):
        if turn % 2:
            one, other = first(), second()
        else:
            other, one = second(), first()
        measured.append((one, other))
    ones, others = (zip(*series, strict=True) for series in zip(*measured[1:], strict=True))
    cells = []
    for of_one, of_other in zip(ones, others, strict=True):
        ratio = statistics.median(b / a for a, b in zip(of_one, of_other, strict=True))
        medians = f"{statistics.median(of_one):.2f} | {statistics.median(of_other):.2f}"
        cells.append(f"{medians} | **{ratio:.2f}**")
    return cells
