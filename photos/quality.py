"""How good a mask is likely to be, and where its border may lie: told from the network's own map.

The expected Jaccard follows from the probabilities alone. What comes is another one: `QualityTable`
translates the first into the second, as masks of held-out photos taught it. The table also has the
two levels of probability between which most of an annotator's outline lies.
`python -m model.quality` makes the table; it belongs to the weights whose digest it names.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["GRADES", "Grade", "QualityTable", "expected_jaccard", "grade"]

Grade = Literal["good", "fair", "poor"]

GRADES: tuple[tuple[float, Grade], ...] = ((0.8, "good"), (0.65, "fair"), (0.0, "poor"))
"""The least Jaccard of each grade. 0.65 is about that of two experts' outlines of one lesion, and
the limit of ISIC 2018; 0.8 is what good networks reach on average."""


@dataclass(frozen=True)
class QualityTable:
    """What held-out photos have taught of a network's masks.

    Raises:
        ValueError: the numbers make no table.
    """

    weights_sha256: str
    """SHA-256 of the weights that it belongs to."""
    photos: int
    """How many held-out photos it was made of."""
    expected: tuple[float, ...]
    """Values of `expected_jaccard`, ascending."""
    jaccard: tuple[float, ...]
    """The Jaccard that is likely at each of them, ascending too; between them it is linear."""
    share: float
    """Part of an annotator's outline that lies between the two levels, on average over photos."""
    generous: float
    """Probability at the generous outline."""
    tight: float
    """Probability at the tight outline."""

    def __post_init__(self) -> None:
        x, y = np.array(self.expected, float), np.array(self.jaccard, float)
        if x.ndim != 1 or len(x) < 2 or x.shape != y.shape:
            raise ValueError("expected and jaccard are not of the same length, 2 or more")
        for name, row in (("expected", x), ("jaccard", y)):
            if not ((row >= 0) & (row <= 1)).all() or (np.diff(row) < 0).any():
                raise ValueError(f"{name} does not ascend within 0 and 1")
        if not 0 < self.generous < self.tight < 1 or not 0 < self.share < 1:
            raise ValueError("generous, tight and share are not within 0 and 1, in this order")

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The table in a JSON document, as `document` writes it.

        Raises:
            ValueError: it has no such table.
        """
        try:
            return cls.of(json.loads(content))
        except (KeyError, TypeError) as error:
            raise ValueError(f"it holds no table of quality: {error!r}") from error

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The table with these fields, which may be lists.

        Raises:
            KeyError, TypeError, ValueError: they make none.
        """
        return cls(
            str(values["weights_sha256"]),
            int(values["photos"]),
            tuple(map(float, values["expected"])),
            tuple(map(float, values["jaccard"])),
            *(float(values[name]) for name in ("share", "generous", "tight")),
        )

    def document(self) -> bytes:
        """The table as a JSON document."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    def quality(self, probability: NDArray[np.float32], lesion: NDArray[np.bool_]) -> float:
        """The Jaccard to be expected of a mask; arguments are those of `expected_jaccard`."""
        return self.likely(expected_jaccard(probability, lesion))

    def likely(self, expected: float) -> float:
        """The Jaccard that masks with this expected one had, to three digits; it never falls."""
        return round(float(np.interp(expected, self.expected, self.jaccard)), 3)


def expected_jaccard(probability: NDArray[np.float32], lesion: NDArray[np.bool_]) -> float:
    """The Jaccard of a mask with the truth, if each pixel is lesion with its own probability.

    Intersection and union are replaced by their expectations: the sum of probabilities within the
    mask, over its area and the sum of probabilities outside of it.

    Args:
        probability: float32 [rows, columns], the network's own map.
        lesion: bool [rows, columns], the mask that was drawn from it.

    Returns:
        0 to 1; 0 for a mask without lesion.
    """
    inside = float(probability[lesion].sum(dtype=np.float64))
    outside = float(probability.sum(dtype=np.float64)) - inside
    union = np.count_nonzero(lesion) + max(outside, 0.0)
    return inside / union if union else 0.0


def grade(jaccard: float) -> Grade:
    """An expected Jaccard in plain words."""
    return next(word for least, word in GRADES if jaccard >= least)
