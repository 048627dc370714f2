"""`python -m server.bulk PHOTOS RESULTS`: masks and a table for a folder of photos."""

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from common.program import Help, program
from common.progress import Progress
from photos.forms import Form, forms
from photos.image import THRESHOLD
from server.backends import BackendError, BackendInfo
from server.bulk.ledger import ALSO, COCO, MASKS, STATE, TABLE, Ledger, Row
from server.bulk.local import Runner, this_machine
from server.bulk.segmenter import Options
from server.bulk.sources import SUFFIXES, BulkError, Source, open_source
from server.observe.logs import configure
from server.settings import Settings, add_flags, settings_of

# The server's settings that do not concern HTTP.
_SETTINGS = (
    "model",
    "backend",
    "precision",
    "engine_dir",
    "threads",
    "decode_threads",
    "max_batch",
    "max_body_bytes",
    "max_pixels",
    "max_pixels_decoding",
    "log_format",
    "log_level",
)

_DESCRIPTION = f"""
Segment any number of photos, without a server.

    %(prog)s photos results
    %(prog)s photos.csv results --also overlay,features --coco

PHOTOS is a folder, with all folders below it, or a list: a text file with one path a line, or a
.csv or .tsv with a column called path. Relative paths start at the folder of the list. RESULTS gets
{MASKS}/, with a 1-bit PNG for each photo under the photo's own path, and {TABLE}, with a line for
each.
"""

_EPILOG = f"""
The run may be stopped or killed; the same command then goes on where it was. It runs a photo again
only if the photo's file has changed, its mask is gone, or it failed for no fault of its own. A
photo that PHOTOS no longer has keeps its line and its mask, if it has one. {STATE} keeps what
is done.

Exit code: 0 if every photo has its mask, 1 if some have none, 2 if the run could not be done, 128 +
the signal's number if one stopped it.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=Help, prog=program("server.bulk"), description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("source", type=Path, metavar="PHOTOS", help="a folder or a list of photos")
    parser.add_argument(
        "results", type=Path, metavar="RESULTS", help="the folder of results; made if it is missing"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        metavar="VALUE",
        help="probability above which a pixel is lesion (default %(default)s)",
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="leave only the largest region of a mask, without its holes",
    )
    parser.add_argument(
        "--also",
        default="",
        metavar="FORM,…",
        help=f"files to write for each photo, into {ALSO}/: {', '.join(Form)} (default: none)",
    )
    parser.add_argument(
        "--coco",
        action="store_true",
        help=f"write {COCO}, one COCO data set of all photos that have a mask, with --also coco",
    )
    parser.add_argument(
        "--frame",
        type=int,
        metavar="N",
        help="which frame of each photo, from 1: for DICOM objects that have several",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="of a Ray cluster to run on (requirements-ray.txt): auto, HOST:PORT, or local. Every"
        " node needs this project, PHOTOS, RESULTS and the network under the same paths",
    )
    parser.add_argument(
        "--ray-gpus",
        type=float,
        default=0,
        metavar="VALUE",
        help="GPUs that each of Ray's actors asks for, such as 1 or 0.5 (default 0); of CPUs it is"
        " --threads, or one",
    )
    add_flags(parser, _SETTINGS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or continue; return the process's exit code."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    source_path, results = given.pop("source"), given.pop("results")
    try:
        coco = given.pop("coco")
        also = forms(given.pop("also") + (f",{Form.COCO}" if coco else ""))
    except ValueError as error:
        parser.error(f"--also: {error}")
    frame = given.pop("frame")
    if frame is not None and frame < 1:
        parser.error(f"--frame counts from 1, got {frame}")
    options = Options(given.pop("threshold"), given.pop("clean"), ",".join(also), frame or 0)
    address, gpus = given.pop("ray"), given.pop("ray_gpus")
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold is a probability, 0 to 1, got {options.threshold:g}")
    settings = settings_of(parser, given)
    configure(settings.log_level, settings.log_format, waits=True)
    try:
        source = open_source(source_path, results)
        with Ledger(results) as ledger:
            return _run(settings, options, source, ledger, address, gpus, coco=coco)
    except (BulkError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
    except sqlite3.Error as error:
        print(f"error: {results / STATE} cannot be written: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or results}: {error.strerror}", file=sys.stderr)
    return 2


def _runner(
    settings: Settings,
    options: Options,
    root: Path,
    masks: Path,
    address: str | None,
    gpus: float,
) -> AbstractContextManager[Runner]:
    if address is None:
        return this_machine(settings, options, root, masks)
    try:
        from server.bulk.cluster import on_ray
    except ImportError as error:
        raise BulkError(f"Ray cannot be loaded, install requirements-ray.txt: {error}") from error
    return on_ray(settings, options, root, masks, address=address, gpus=gpus)


def _run(
    settings: Settings,
    options: Options,
    source: Source,
    ledger: Ledger,
    address: str | None,
    gpus: float,
    *,
    coco: bool,
) -> int:
    with _runner(settings, options, source.root, ledger.masks, address, gpus) as runner:
        _take_stock(ledger, source, runner.info, options)
        counts = ledger.counts()
        progress = Progress(counts.listed, counts.done, counts.unsuccessful)

        def record(path: str, row: Row) -> None:
            ledger.record([(path, row)])
            progress.add(successful=row.status == "ok")

        try:
            stopped_by = runner.run(ledger.pending(), record)
        finally:
            progress.end()
            ledger.write_table()
            if coco:
                ledger.write_coco()
        return _conclude(ledger, stopped_by)


def _take_stock(ledger: Ledger, source: Source, info: BackendInfo, options: Options) -> None:
    """List the photos to be done."""
    weights = info.model.get("weights_sha256")
    if not weights:
        raise BulkError(
            "The network does not say which it is (weights_sha256 in its metadata), so results of"
            " it could not be told from another's. Export it with `python -m model.export`."
        )
    # The same weights give other masks with another form of attention.
    attention = info.model.get("attention", "unknown")
    ledger.begin(
        source=source.identity, weights_sha256=weights, attention=attention, **asdict(options)
    )
    print(f"listing {source.identity}", file=sys.stderr)
    listing = ledger.list(source.photos())
    if repeated := listing.repeated:
        print(f"{repeated} paths were listed more than once, each is run once", file=sys.stderr)
    if dropped := listing.dropped:
        print(f"{dropped} photos that are no longer there have no line any more", file=sys.stderr)
    if others := source.passed_over:
        kinds = ", ".join(suffix or "no suffix" for suffix, _ in others.most_common(5))
        print(f"{others.total()} other files are passed over ({kinds})", file=sys.stderr)
    if not listing.named:
        raise BulkError(
            f"{source.identity} has no photos. Of a folder, files are taken that end in"
            f" {', '.join(SUFFIXES)}."
        )


def _conclude(ledger: Ledger, stopped_by: int) -> int:
    counts = ledger.counts()
    print(f"{counts.done - counts.unsuccessful} masks in {ledger.masks}", file=sys.stderr)
    if counts.unsuccessful:
        print(
            f"{counts.unsuccessful} of {counts.listed} photos failed, {ledger.table} says why",
            file=sys.stderr,
        )
    if stopped_by:
        left = counts.listed - counts.done
        print(f"stopped, {left} photos are left: the same command goes on", file=sys.stderr)
        return 128 + stopped_by
    return 1 if counts.unsuccessful else 0


if __name__ == "__main__":
    sys.exit(main())
