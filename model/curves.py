"""Draw runs' learning curves side by side.

    python -m model.curves runs/a/history.csv runs/b/history.csv --out curves.svg

A run is named by its file, or by its folder where the file is `history.csv`. The upper panel has
the loss on (augmented) training images, the lower one the Jaccard of every selection set.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from common.program import Help
from model.truth import DataError

Curve = tuple[list[float], list[float]]


def read_history(path: Path) -> dict[str, Curve]:
    """Columns of a `history.csv` by name. A column has epochs and values, but no empty cells.

    Raises:
        DataError: `model.train` did not write the file.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        curves: dict[str, Curve] = {}
        for row in rows:
            for name, value in row.items():
                if value:
                    epochs, values = curves.setdefault(name, ([], []))
                    epochs.append(float(row["epoch"]))
                    values.append(float(value))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a history.csv of model.train: {error}") from error
    if "loss" not in curves:
        raise DataError(f"{path} is not a history.csv of model.train: it has no losses")
    return curves


def draw(files: Sequence[Path], out: Path) -> None:
    """Draw the picture and write it; its suffix decides the format.

    Raises:
        DataError: `model.train` did not write one of the files.
        ValueError: there is no format of that suffix.
    """
    with rc_context({"svg.hashsalt": "slsnet"}):  # the same curves give the same file
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for number, file in enumerate(files):
            name = file.parent.name if file.name == "history.csv" else file.stem
            curves = read_history(file)
            above.plot(*curves["loss"], color=f"C{number}", label=name)
            measured = [c for c in curves if c.endswith("_jaccard") and "threshold" not in c]
            for column, dashes in zip(measured, ("-", "--", ":"), strict=False):
                epochs, values = curves[column]
                best = max(range(len(values)), key=values.__getitem__)
                label = f"{name}, {column.removesuffix('_jaccard')}: best {values[best]:.3f}"
                below.plot(epochs, values, dashes, color=f"C{number}", label=label)
                below.plot(epochs[best], values[best], "o", color=f"C{number}")
        above.set_ylabel("training loss")
        below.set_ylabel("Jaccard")
        below.set_xlabel("epoch")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.savefig(out, dpi=130, metadata={"Date": None} if out.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> None:
    """Read the histories, and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m model.curves",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="history.csv", help="of runs to draw"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the picture, .svg or .png"
    )
    args = parser.parse_args(argv)
    try:
        draw(args.files, args.out)
    except (ValueError, OSError) as error:  # a DataError, or a suffix of no format
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
