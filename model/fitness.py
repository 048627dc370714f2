"""What dermoscopic photos look like: the detector of other pictures is fitted here, and tested.

    python -m model.fitness fit --data DIR --weights model/weights/slsnet.safetensors
    python -m model.fitness report --images DIR --others DIR

`fit` writes `X.fitness.json` beside the weights `X.safetensors`, from the photos that the network
was trained on. Their features (`photos.fitness`) make a Gaussian mixture; folds of the photos, each
held against the mixture of the others, say how far a photo may be from it. `report` counts how many
other dermoscopic photos would be warned of, and how many other pictures would not.
"""

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.files import write_atomically
from common.program import Help, program
from model.commands import run_command
from model.data import add_data_arguments, find_samples, hold_out
from model.evaluate import WEIGHTS, Network, add_model_argument, load_network
from model.others import KINDS, drawn, of_packages
from model.truth import DataError, find_photos
from model.variations import FRAMES
from photos.fitness import FEATURES, Detector, features, is_unfit
from photos.image import MODEL_SIZE, ImageError, read_photo

__all__ = ["cost", "fit", "report"]

Values = NDArray[np.float64]
Pixels = NDArray[np.uint8]

GROUPS = 8
"""Normal distributions of the mixture."""

FOLDS = 5
PASSING = 0.995
"""Share of the held-out photos that are within the limit. A few training photos are as odd as a
face; another 0.5 % more of them would be found with 1 % of false alarms."""

_SPREAD = 0.2
"""Added to the variance of each standardised feature in each group: few photos, or much alike ones,
would make a distribution that other photos are not in."""

_LEAST_PHOTOS = 10 * FEATURES
_DRAWN_EACH = 60
_TURNS = 25


def fit(found: Values, folds: NDArray[np.integer], weights_sha256: str) -> Detector:
    """Fit a detector to dermoscopic photos.

    Args:
        found: their features, float64 [photos, FEATURES].
        folds: which of `FOLDS` each is in, int [photos].
        weights_sha256: digest of the network's weights.

    Raises:
        DataError: there are too few.
    """
    if len(found) < _LEAST_PHOTOS:
        raise DataError(
            f"{len(found)} photos are too few to fit a detector to: take {_LEAST_PHOTOS} or more"
        )
    distances = []
    for fold in range(FOLDS):
        apart = folds == fold
        others = _mixture(found[~apart])
        distances.append(_distances(found[apart], *others))
    limit = float(np.quantile(np.concatenate(distances), PASSING))
    means, whitening, offsets = _mixture(found)
    upper = np.triu_indices(FEATURES)
    return Detector(
        weights_sha256,
        len(found),
        round(limit, 4),
        tuple(map(_digits, means)),
        tuple(_digits(matrix[upper]) for matrix in whitening),
        _digits(offsets),
    )


def _mixture(found: Values) -> tuple[Values, Values, Values]:
    """Means, whitening matrices and offsets of the groups, as a `Detector` has them."""
    from sklearn.mixture import GaussianMixture

    centre, deviation = found.mean(axis=0), found.std(axis=0) + 1e-6
    mixture = GaussianMixture(GROUPS, reg_covar=_SPREAD, random_state=0)
    mixture.fit((found - centre) / deviation)
    roots = np.array(mixture.precisions_cholesky_)
    widths = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
    offsets = -2 * (np.log(mixture.weights_) + widths)
    means = centre + deviation * np.array(mixture.means_)
    return means, roots / deviation[:, None], offsets - offsets.min()


def _distances(found: Values, means: Values, whitening: Values, offsets: Values) -> Values:
    white = np.einsum("pgf,gfw->pgw", found[:, None] - means, whitening)
    return np.asarray(np.sqrt(((white**2).sum(axis=2) + offsets).min(axis=1)))


def _digits(values: Values) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values.tolist())


def report(
    detector: Detector,
    photos: Mapping[str, Iterable[Pixels]],
    others: Iterable[tuple[str, Iterable[Pixels]]],
) -> str:
    """How many pictures a detector finds unfit, as Markdown; photos are tried in frames too.

    Args:
        detector: to be tested.
        photos: dermoscopic ones that it was not fitted to, by name; uint8 [128, 128, 3] each.
        others: kinds of other pictures.
    """
    lines = ["| dermoscopic photos | warned of | of |", "|---|--:|--:|"]
    for name, images in photos.items():
        plain = list(images)
        framed = {f"{name}, {how}": map(frame, plain) for how, frame in FRAMES.items()}
        for called, pictures in {name: plain, **framed}.items():
            distances = [detector.distance(picture) for picture in pictures]
            lines.append(f"| {called} | {_unfit(distances)} | {len(distances)} |")
    lines += ["", "| other pictures | found | of | share |", "|---|--:|--:|--:|"]
    found = total = 0
    for kind, images in others:
        distances = [detector.distance(image) for image in images]
        if distances:
            unfit = _unfit(distances)
            found, total = found + unfit, total + len(distances)
            lines.append(f"| {kind} | {unfit} | {len(distances)} | {unfit / len(distances):.0%} |")
    if total:
        lines.append(f"| **all** | **{found}** | **{total}** | **{found / total:.1%}** |")
    return "\n".join(lines)


def _unfit(distances: Sequence[float]) -> int:
    return sum(map(is_unfit, distances))


def cost(detector: Detector, network: Network) -> str:
    """What a distance costs beside the network, in CPU time, both measured by turns."""
    image = small(drawn("landscape", 0))
    spent: dict[str, list[float]] = {"distance": [], "network": []}
    for _ in range(_TURNS):
        began = time.process_time()
        detector.distance(image)
        middle = time.process_time()
        network.predict(image[np.newaxis])
        spent["distance"].append(1000 * (middle - began))
        spent["network"].append(1000 * (time.process_time() - middle))
    distance, beside = (float(np.median(times)) for times in spent.values())
    return (
        f"A distance takes {distance:.2f} ms of a core, {distance / beside:.1%} of the network's"
        f" {beside:.1f} ms."
    )


def small(pixels: Pixels) -> Pixels:
    """A picture as the network gets it, uint8 [128, 128, 3]."""
    size = (MODEL_SIZE, MODEL_SIZE)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _other_pictures(folders: Sequence[Path]) -> Iterator[tuple[str, Iterable[Pixels]]]:
    for kind in KINDS:
        yield f"{kind}, drawn", (small(drawn(kind, seed)) for seed in range(_DRAWN_EACH))
    shipped: dict[str, list[Pixels]] = {}
    for name, pixels in of_packages():
        shipped.setdefault(name.partition("/")[0], []).append(pixels)
    yield from ((f"pictures of {package}", images) for package, images in shipped.items())
    yield from ((folder.name, _read(find_photos(folder))) for folder in folders)


def _read(paths: Iterable[Path]) -> Iterator[Pixels]:
    for path in paths:
        try:
            yield read_photo(path.read_bytes()).pixels
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error


def _fit(options: argparse.Namespace) -> str:
    from model.config import TrainConfig
    from model.splits import split_samples

    digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
    training, _ = split_samples(TrainConfig(), find_samples(options.data), options.cache)
    folds = np.zeros(len(training), int)
    for fold in range(FOLDS):
        held = {sample.id for sample in hold_out(training, fold, FOLDS)[1]}
        folds[[sample.id in held for sample in training]] = fold
    found = np.array([features(pixels) for pixels in _read(sample.image for sample in training)])
    detector = fit(found, folds, digest)
    output = options.output or options.weights.with_suffix(".fitness.json")
    write_atomically(output, detector.document())
    return f"{output}: fitted to {detector.photos} photos"


def _report(options: argparse.Namespace) -> str:
    path = options.detector or options.model.with_suffix(".fitness.json")
    detector = Detector.parse(path.read_bytes())
    photos: dict[str, Iterable[Pixels]]
    photos = {folder.name: _read(find_photos(folder)) for folder in options.images}
    counted = report(detector, photos, _other_pictures(options.others))
    return f"{counted}\n\n{cost(detector, load_network(options.model))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("model.fitness"), description=__doc__, formatter_class=Help
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser("fit", formatter_class=Help, help="fit a detector to a data set")
    add_data_arguments(make)
    make.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS.with_suffix(".safetensors"),
        metavar="FILE",
        help="the detector is for these (default: the shipped ones)",
    )
    make.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the detector (default: beside the weights, .fitness.json)",
    )
    make.set_defaults(run=_fit)
    test = commands.add_parser("report", formatter_class=Help, help="test one on other pictures")
    folders: dict[str, Any] = {"type": Path, "nargs": "+", "metavar": "DIR"}
    test.add_argument(
        "--images", required=True, help="dermoscopic photos that it was not fitted to", **folders
    )
    test.add_argument(
        "--others", default=[], help="more pictures that are no dermoscopic photos", **folders
    )
    add_model_argument(test)
    test.add_argument(
        "--detector",
        type=Path,
        metavar="FILE",
        help="the one to test (default: beside the network)",
    )
    test.set_defaults(run=_report)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(_parser(), arguments)


if __name__ == "__main__":
    main()
