r"""Score a network on any folder pair, at the size of the masks.

    python -m model.evaluate --images DIR --masks DIR
    python -m model.evaluate --images DIR --masks DIR --model runs/a/best.safetensors \
        --report a.json --gallery a-gallery
    python -m model.evaluate --images DIR --masks DIR --camera 160x120
    python -m model.evaluate --images DIR --masks DIR --report a-report     # by skin tone, …

`X.jpg|png|bmp|…` belongs to `X_segmentation.png` or the like (`model.truth`). Every image is
squashed to the network's input, its probabilities are up-sampled to the mask's size and thresholded
there. Figures are per image, then averaged (`model.metrics`). Everything is checked before the
network runs. `--camera` shows what a low-resolution camera costs: the network gets each image as
such a camera would send it.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from common.program import Help, program
from common.progress import Progress, say
from common.tables import to_cell
from model.data import Sample, add_pair_arguments, find_pairs
from model.metrics import (
    METRICS,
    Calibration,
    Confusion,
    count_packed,
    jaccard,
    macro_average,
    stack,
)
from model.names import add_network_argument, check_name, name_of
from model.truth import DataError, read_truth
from photos.image import MODEL_SIZE, THRESHOLD, ImageError, Photo, read_photo
from photos.regions import mask_of

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "slsnet.onnx"

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""The Jaccard is also computed at these thresholds."""

_BATCH = 16

# What browsers take for a canvas' JPEG unless they are told otherwise.
_CAMERA_QUALITY = 92


@dataclass(frozen=True)
class Network:
    """A trained network, for any runtime."""

    path: Path
    size: int
    """Side of its input, pixels."""
    metadata: dict[str, str]
    predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    """uint8 [n, size, size, 3] RGB → probability float32 [n, size, size]."""


@dataclass(frozen=True)
class Case:
    """One image, its truth in figures, and the network's answer."""

    sample: Sample
    image_size: tuple[int, int]
    """Width and height, pixels."""
    mask_size: tuple[int, int]
    lesion_share: float
    """Part of the frame that the mask calls lesion, 0 to 1."""
    probability: NDArray[np.float32]
    """The network's answer [size, size], cleaned if that was asked for."""


@dataclass(frozen=True)
class Evaluation:
    """All cases with their counts."""

    network: Network
    threshold: float
    clean: bool
    """Whether only the largest region counts, without its holes."""
    cases: list[Case]
    confusion: Confusion
    """Counts at `threshold`; arrays [images]."""
    sweep: dict[float, float]
    """Mean Jaccard by threshold."""
    calibration: Calibration

    def report(self) -> dict[str, Any]:
        """The figures in the form of the JSON report."""
        figures = jaccard(self.confusion)
        spread = figures.std(ddof=1) / np.sqrt(len(figures)) if len(figures) > 1 else 0.0
        return {
            **macro_average(self.confusion),
            "count": len(self.cases),
            "uniform_masks": self.uniform_masks(),
            "threshold": self.threshold,
            "jaccard_standard_error": float(spread),
            "calibration_error": self.calibration.error(),
            "jaccard_by_threshold": {f"{t:.2f}": value for t, value in self.sweep.items()},
            "model": {"file": self.network.path.name, **self.network.metadata},
        }

    def uniform_masks(self) -> list[str]:
        """Ids whose mask is all lesion or has none. Such a mask is usually a mistake."""
        return [case.sample.id for case in self.cases if case.lesion_share in (0, 1)]

    def rows(self) -> Iterator[dict[str, str | int | float]]:
        """Rows for a CSV, one for each case."""
        figures = {name: metric(self.confusion) for name, metric in METRICS.items()}
        for index, case in enumerate(self.cases):
            predicted = self.confusion.tp[index] + self.confusion.fp[index]
            yield {
                "id": to_cell(case.sample.id),
                "image_width": case.image_size[0],
                "image_height": case.image_size[1],
                "mask_width": case.mask_size[0],
                "mask_height": case.mask_size[1],
                "lesion_share": round(case.lesion_share, 6),
                "predicted_share": round(predicted / np.prod(case.mask_size), 6),
                **{name: round(float(values[index]), 9) for name, values in figures.items()},
            }


def load_network(path: Path, size: int | None = None, name: str | None = None) -> Network:
    """Load an ONNX graph with ONNX Runtime, or safetensors weights with PyTorch.

    Args:
        path: `.onnx` or `.safetensors`.
        size: side of the input, pixels. It is needed only for safetensors that do not say theirs
            and were not trained at 128.
        name: the network that the caller wants (`model.names`); by default whatever the file holds.

    Raises:
        ValueError: the file is of another kind, holds no network of this project, or another
            network or size.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass --model the file of a trained network")
    if path.suffix == ".onnx":
        network = _load_onnx(path)
        check_name(path, name_of(network.metadata), name)
        if size not in (None, network.size):
            raise ValueError(
                f"{path} takes inputs of {network.size}×{network.size}, not {size}×{size}"
            )
        return network
    if path.suffix == ".safetensors":
        return _load_safetensors(path, size, name)
    raise ValueError(f"{path} is neither .onnx nor .safetensors")


def evaluate(
    samples: Sequence[Sample],
    network: Network,
    threshold: float = THRESHOLD,
    *,
    clean: bool = False,
    camera: tuple[int, int] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run the network on every image, and count pixels at every mask's size.

    Args:
        samples: images with their masks, as `model.data.find_pairs` returns them.
        threshold: probability above which a pixel is lesion.
        clean: count only the largest region, without its holes (`photos.regions`).
        camera: width and height of a camera, pixels: each image is reduced until it fits, and
            compressed as JPEG, before the network gets it.

    Raises:
        DataError: an image or a mask cannot be used. It is raised before the network runs.
    """
    with ThreadPoolExecutor() as pool:
        with _progress("checked", len(samples), shown=progress) as tell:
            photos = []
            for photo in pool.map(lambda sample: _check(sample, network.size, camera), samples):
                photos.append(photo)
                tell()
        cases: list[Case] = []
        counts: list[list[Confusion]] = []
        calibration = Calibration()
        thresholds = (threshold, *THRESHOLDS)
        with _progress("evaluated", len(samples), shown=progress) as tell:
            for start in range(0, len(samples), _BATCH):
                part = slice(start, start + _BATCH)
                probabilities = network.predict(np.stack([p.pixels for p in photos[part]]))
                scored = pool.map(
                    lambda sample, photo, probability: _score(
                        sample, photo, probability, thresholds, clean=clean
                    ),
                    samples[part],
                    photos[part],
                    probabilities,
                )
                for (case, confusions, truth_share), probability in zip(
                    scored, probabilities, strict=True
                ):
                    cases.append(case)
                    counts.append(confusions)
                    calibration.add(probability, truth_share)
                    tell()
    at_thresholds = [stack(column) for column in zip(*counts, strict=True)]
    sweep = {
        t: float(jaccard(c).mean()) for t, c in zip(THRESHOLDS, at_thresholds[1:], strict=True)
    }
    return Evaluation(network, threshold, clean, cases, at_thresholds[0], sweep, calibration)


def _check(sample: Sample, size: int, camera: tuple[int, int] | None) -> Photo:
    """Read the image and its mask, so that a bad file shows before the long part."""
    try:
        data = sample.image.read_bytes()
        photo = read_photo(data, size=size)
        if camera is not None:
            photo = replace(photo, pixels=read_photo(_filmed(data, camera), size=size).pixels)
    except (ImageError, OSError) as error:
        raise DataError(f"{sample.image}: {error}") from error
    height, width = read_truth(sample.mask).shape
    if (width, height) == (photo.height, photo.width) and width != height:
        raise DataError(
            f"{sample.mask} is {width}×{height}, its image {photo.width}×{photo.height} after EXIF"
            " orientation: turn the mask as the image is"
        )
    return photo


def _filmed(data: bytes, camera: tuple[int, int]) -> bytes:
    """A photo as a camera of this width and height would send it; a smaller one stays so large."""
    with Image.open(BytesIO(data)) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB")
    # Each of the camera's pixels averages the light that falls on it.
    picture.thumbnail(camera, Image.Resampling.BOX, reducing_gap=None)
    out = BytesIO()
    picture.save(out, "JPEG", quality=_CAMERA_QUALITY)
    return out.getvalue()


def _score(
    sample: Sample,
    photo: Photo,
    probability: NDArray[np.float32],
    thresholds: Sequence[float],
    *,
    clean: bool,
) -> tuple[Case, list[Confusion], NDArray[np.float32]]:
    """Give the case, its counts at each threshold, and the truth's shares at the network's size."""
    truth = read_truth(sample.mask)
    height, width = truth.shape
    packed = np.packbits(truth, axis=1)
    # The first threshold gives the figures; the others give the sweep.
    drawn = [mask_of(probability, width, height, t, clean=clean) for t in thresholds]
    confusions = [count_packed(mask, packed, truth.size) for _, mask in drawn]
    grey = Image.fromarray(truth.astype(np.uint8) * 255)
    height, width = probability.shape
    small = grey.resize((width, height), Image.Resampling.BOX)
    share = np.asarray(small, np.float32) / np.float32(255)
    case = Case(
        sample,
        (photo.width, photo.height),
        (truth.shape[1], truth.shape[0]),
        float(truth.mean()),
        drawn[0][0],
    )
    return case, confusions, share


def _load_onnx(path: Path) -> Network:
    from common.onnx import onnx_session

    try:
        session = onnx_session(path)
    except Exception as error:  # ONNX Runtime has an untyped error for each of its statuses
        raise ValueError(f"{path} is not a readable ONNX model: {error}") from error
    (image, *more_in), (probability, *more_out) = session.get_inputs(), session.get_outputs()
    _, height, width, channels = image.shape if len(image.shape) == 4 else (None,) * 4
    if (
        more_in
        or more_out
        or image.type != "tensor(uint8)"
        or not isinstance(height, int)
        or (height, channels) != (width, 3)
    ):
        raise ValueError(
            f"{path} takes {image.type} {image.shape}, not uint8 [n, size, size, 3]: export it with"
            " python -m model.export"
        )

    def predict(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        (found,) = session.run([probability.name], {image.name: batch})
        return np.asarray(found, np.float32)

    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Network(path, height, metadata, predict)


def torch_network(path: Path, network: "nn.Module", size: int, metadata: dict[str, str]) -> Network:
    """Wrap a PyTorch network in evaluation mode (images in [0, 1] → logits) for `evaluate`."""
    import torch

    def predict(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            image = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
            return np.asarray(torch.sigmoid(network(image))[:, 0].numpy())

    return Network(path, size, metadata, predict)


def _load_safetensors(path: Path, size: int | None, name: str | None) -> Network:
    from model.generator import input_size, load_metadata
    from model.networks import read_network

    network = read_network(path, name)
    return torch_network(path, network, input_size(path, size), load_metadata(path))


@contextmanager
def _progress(stage: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield what is called after each image."""
    if not shown:
        yield lambda: None
        return
    progress = Progress(total, stage=f"{stage} ")
    try:
        yield progress.add
    finally:
        progress.end()


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the same keys, one or more, as CSV."""
    first, *others = rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, first.keys())
        writer.writeheader()
        writer.writerows([first, *others])


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, a file that `load_network` reads."""
    parser.add_argument(
        "--model",
        type=Path,
        default=WEIGHTS,
        metavar="FILE",
        help="the network, .onnx or .safetensors (default: the shipped one)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=Help,
        prog=program("model.evaluate"),
        description=__doc__,
    )
    add_pair_arguments(parser)
    add_model_argument(parser)
    add_network_argument(parser, "refuse a file of another one")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="probability above which a pixel is lesion, 0 to 1",
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="count only the largest region, without its holes (default: the mask as it is)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help=f"side of the input (default: what the file says, or {MODEL_SIZE})",
    )
    parser.add_argument(
        "--camera",
        metavar="WxH",
        help="reduce each image to what such a camera sends, as 160x120 (default: as it is)",
    )
    _add_outputs(parser)
    return parser


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        type=Path,
        metavar="OUT.json|DIR",
        help="the figures, OUT.csv has them per image; or a folder for a page with the figures by"
        " skin tone, lesion size, hair and so on, and on blurred, noisy and other poorer photos,"
        " which takes minutes",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="OUT.csv", help="figures per image, in this file"
    )
    parser.add_argument(
        "--gallery", type=Path, metavar="DIR", help="a page: worst, median, best cases, and plots"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, and print or write what is asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold {options.threshold} is not within 0 and 1")
    if options.size is not None and (options.size < 8 or options.size % 8):
        parser.error(f"--size {options.size} is not a multiple of 8")
    camera = None
    if options.camera is not None:
        if not (sides := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", options.camera)):
            parser.error(f"--camera {options.camera} is not width x height, as 160x120")
        camera = int(sides[1]), int(sides[2])
    figures = options.report if options.report and options.report.suffix == ".json" else None
    table = options.csv or (figures and figures.with_suffix(".csv"))
    try:
        for file in filter(None, (options.report, table)):
            file.parent.mkdir(parents=True, exist_ok=True)
        # Imported before the long part, since it needs packages that serving does without.
        write_gallery = import_module("model.gallery").write_gallery if options.gallery else None
        network = load_network(options.model, options.size, options.network)
        samples = find_pairs(options.images, options.masks)
        evaluation = evaluate(
            samples, network, options.threshold, clean=options.clean, camera=camera, progress=True
        )
        report = evaluation.report()
        if figures:
            figures.write_text(json.dumps(report, indent=2) + "\n")
        elif options.report:
            import_module("model.report").write_report(evaluation, options.report, say)
        if table:
            write_table(table, evaluation.rows())
        if write_gallery:
            write_gallery(evaluation, options.gallery)
    except ModuleNotFoundError as error:
        parser.exit(1, f"{parser.prog}: error: {error}: pip install -r requirements-train.txt\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if uniform := evaluation.uniform_masks():
        shown = ", ".join(uniform[:5]) + (", …" if len(uniform) > 5 else "")
        print(
            f"{parser.prog}: warning: masks that are empty or all lesion ({len(uniform)}): {shown}",
            file=sys.stderr,
        )
    for name in (*METRICS, "calibration_error", "count"):
        value = report[name]
        print(f"{name:>18}  {value if name == 'count' else format(value, '.4f')}")


if __name__ == "__main__":
    main()
