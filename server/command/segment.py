"""The masks of some photos, written beside them, without a server.

    slsnet segment lesion.jpg                     lesion_mask.png, in the photo's folder
    slsnet segment *.jpg -o masks --also overlay,features    and the outline drawn over each photo,
                                                             and measurements as JSON
    slsnet segment lesion.jpg --clean --threshold 0.4

The masks are those of `POST /segment`: 1-bit PNG at the photo's size, lesion white. A photo that
cannot be read costs its own mask only; the exit code is then 1.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.files import write_atomically
from common.program import Help, fraction, program
from photos.fitness import is_unfit
from photos.forms import Form, Found, encoded, forms
from photos.image import THRESHOLD, ImageError, encode_png, read_photo
from photos.quality import grade
from server.backends import Backend, BackendError, BackendInfo, open_backend
from server.backends.model_file import read_detector, read_quality
from server.cores import available_cores
from server.settings import Settings

__all__ = ["main"]


def _targets(photo: Path, folder: Path | None, forms: Sequence[Form]) -> list[Path]:
    stem = (folder or photo.parent) / photo.stem
    suffixes = ["_mask.png", *(form.suffix for form in forms)]
    return [stem.with_name(stem.name + suffix) for suffix in suffixes]


def _segment(
    photo: Path,
    targets: Sequence[Path],
    backend: Backend,
    info: BackendInfo,
    options: argparse.Namespace,
) -> str:
    """Write the files of one photo; return the line that says what was found."""
    started = time.perf_counter()
    data = photo.read_bytes()
    read = read_photo(data)
    probability: NDArray[np.float32] = backend.infer(read.pixels[np.newaxis])[0]
    found = Found(
        *(probability, read.width, read.height, options.threshold),
        clean=options.clean,
        pixels=read.pixels,
    )
    contents = [encode_png(found.packed, read.width, read.height)]
    contents += [encoded(form, found, data) for form in options.also]
    for target, content in zip(targets, contents, strict=True):
        write_atomically(target, content)
    share = found.lesion.area / (read.width * read.height)
    says = f"lesion on {share:.1%} of the photo" if share else "no lesion found"
    if info.quality is not None:
        quality = info.quality.quality(probability, found.probability > found.threshold)
        says += f", quality {quality:.3f} ({grade(quality)})"
    if info.detector is not None and is_unfit(info.detector.distance(read.pixels)):
        says += ", WARNING: likely no dermoscopic photo"
    took_ms = 1000 * (time.perf_counter() - started)
    return f"{says}, {took_ms:.0f} ms -> {', '.join(map(str, targets))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("server.command.segment"),
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "photos", type=Path, nargs="+", metavar="PHOTO", help="a file that /segment would read"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the folder for all files (default: each photo's own)",
    )
    parser.add_argument(
        "--also",
        default="",
        metavar="FORM,…",
        help=f"files to write beside each mask: {', '.join(Form)} (default: none)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace masks that are there (default: refuse)"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=THRESHOLD,
        help="probability above which a pixel is lesion, 0 to 1",
    )
    parser.add_argument(
        "--clean", action="store_true", help="leave the largest region only, without its holes"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Settings.model_fields["model"].default,
        metavar="FILE",
        help="the network, an ONNX file (default: the shipped one)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.also = forms(options.also)
    except ValueError as error:
        parser.error(f"--also: {error}")
    plan = [(photo, _targets(photo, options.output, options.also)) for photo in options.photos]
    taken: dict[Path, Path] = {}
    for photo, targets in plan:
        for target in targets:
            if target in taken:
                parser.exit(2, f"{taken[target]} and {photo} would both become {target}\n")
            taken[target] = photo
            if target.exists() and not options.overwrite:
                parser.exit(2, f"{target} is there: pass --overwrite, or -o another folder\n")
    try:
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
        backend = open_backend("auto", options.model, threads=available_cores())
        info = backend.describe()
        info = replace(
            info,
            quality=read_quality(options.model, info.model),
            detector=read_detector(options.model, info.model),
        )
    except (BackendError, OSError) as error:
        parser.exit(1, f"{error}\n")
    failed = False
    for photo, targets in plan:
        try:
            print(f"{photo}: {_segment(photo, targets, backend, info, options)}", flush=True)
        except (ImageError, OSError, BackendError) as error:
            failed = True
            said = error.strerror if isinstance(error, OSError) and error.strerror else error
            print(f"{photo}: {said}", file=sys.stderr, flush=True)
    backend.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
