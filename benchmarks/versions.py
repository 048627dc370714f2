"""Compares the server with an earlier version of it: `python -m benchmarks.versions REVISION`.

It unpacks the revision from git into a temporary folder and starts the server of both versions,
each with a network of 0 ms (`benchmarks.peers.slsnet`). Then it sends the same photos to one and
the other in turn, over HTTP. So it shows what a change of the code costs or saves outside the
network, whatever else the machine does. Both run with this Python and its packages.

For each load it prints a Markdown row: CPU time of the server for a photo, p50 of a request as the
client sees it, and photos a second. Each figure is the median over the turns, and each ratio is the
median of the turns' own ratios, now / before.

Photos are those of `--images` (default: SLSNET_DATA's native ones), once as they are and once
resized to 600×450, or generated ones. `--phones` sends the smaller ones as AVIF and HEIC instead;
`--dicom` sends them as DICOM objects, and asks for JSON and for DICOM objects.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import product, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.latency import JPEG_QUALITY, Client, machine
from benchmarks.turns import compared
from common.program import Help
from tests.support import ROOT
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import lesion_photo
from tests.support.phones import FORMATS, encode_phone

_SMALL = (600, 450)
_LARGE = (3024, 2016)
_PHOTOS = 20
_CLIENTS = (1, 8, 32)

# What has a process of its own could take seconds each.
_FEW = 4
_FEW_CLIENTS = (1, 4)
_ASKED = {"DICOM → JSON": "?format=json", "DICOM → DICOM": "?format=dicom&objects=seg,sr"}


@dataclass(frozen=True)
class Load:
    """What is sent in a turn: every photo once, by so many clients together."""

    name: str
    photos: Sequence[bytes]
    clients: int
    query: str = ""


def compare(before: ServerProcess, now: ServerProcess, load: Load, turns: int) -> str:
    """Ask both servers in turn, once more than `turns`, and make a row of the table.

    Args:
        before: the earlier version.
        now: this version.
        load: what each of them gets in each turn.
        turns: number of turns that the medians are of; the first one only warms up.
    """
    cells = compared(partial(send, before, load), partial(send, now, load), turns)
    return f"| {load.name} | {load.clients} | {' | '.join(cells)} |"


def send(server: ServerProcess, load: Load) -> tuple[float, float, float]:
    """Send a load; return ms of CPU time a photo, p50 of a request in ms, and photos a second."""
    with contextlib.ExitStack() as stack:
        clients = [Client(server) for _ in range(load.clients)]
        for client in clients:
            stack.callback(client.close)
        shares = [load.photos[number :: load.clients] for number in range(load.clients)]
        cpu_s, started = server.cpu_s(), time.perf_counter()
        with ThreadPoolExecutor(load.clients) as threads:
            series = list(threads.map(_times, clients, shares, repeat(load.query)))
        seconds, cpu_s = time.perf_counter() - started, server.cpu_s() - cpu_s
    times = [whole for one in series for whole in one]
    return cpu_s / len(times) * 1000, statistics.median(times), len(times) / seconds


def _times(client: Client, photos: Sequence[bytes], query: str) -> list[float]:
    return [client.segment(photo, query).whole for photo in photos]


def unpack(revision: str, folder: Path) -> None:
    """Write the files of a git revision into a folder.

    Raises:
        subprocess.CalledProcessError: git knows no such revision.
    """
    archive = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def load_photos(folder: Path) -> tuple[list[bytes], list[bytes], str]:
    """Small photos, large ones, and where they are from."""
    found = sorted(folder.glob("*.jpg"))[:_PHOTOS] if folder.is_dir() else []
    if found:
        small = [_jpeg(_resized(path)) for path in found]
        return small, [path.read_bytes() for path in found], str(folder)
    pictures = [
        [_jpeg(Image.fromarray(lesion_photo(seed, *size).pixels)) for seed in range(_PHOTOS)]
        for size in (_SMALL, _LARGE)
    ]
    return pictures[0], pictures[1], "generated"


def loads(images: Path, *, dicom: bool = False, phones: bool = False) -> tuple[list[Load], str]:
    """What is sent, and where the photos are from."""
    small, large, source = load_photos(images)
    clients = _FEW_CLIENTS if dicom or phones else _CLIENTS
    sent = [("600×450", small * 4, ""), ("as they are", large * 4, "")]
    if dicom:
        # Not above: other photos need no pydicom.
        from tests.support.dicom import dicom_bytes

        objects = [dicom_bytes(_pixels(photo)) for photo in small[:_FEW]]
        sent = [(name, objects, query) for name, query in _ASKED.items()]
    elif phones:
        few = [_pixels(photo) for photo in small[:_FEW]]
        sent = [(name, [encode_phone(one, name) for one in few], "") for name in FORMATS]
    return [
        Load(name, photos, number, query)
        for (name, photos, query), number in product(sent, clients)
    ], source


def _pixels(photo: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(photo)))


def _resized(path: Path) -> Image.Image:
    with Image.open(path) as photo:
        return ImageOps.exif_transpose(photo).convert("RGB").resize(_SMALL)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions", description=__doc__, formatter_class=Help
    )
    parser.add_argument("revision", help="the earlier version, as git names it")
    default = Path(os.environ.get("SLSNET_DATA", "../shared/data")) / "native"
    parser.add_argument("--images", type=Path, default=default, help="folder of JPEGs")
    parser.add_argument(
        "--turns", type=int, default=9, help="turns that are measured, of each load"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--dicom", action="store_true", help="send DICOM objects")
    kinds.add_argument("--phones", action="store_true", help="send photos as AVIF and HEIC")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slsnet-") as folder:
        try:
            unpack(options.revision, Path(folder))
        except subprocess.CalledProcessError:
            parser.error(f"git has no revision {options.revision}")
        sent, source = loads(options.images, dicom=options.dicom, phones=options.phones)
        command = ("-m", "benchmarks.peers.slsnet")
        stub = {"PEER_NETWORK": "stub:0"}
        with (
            serve(command=command, environment=stub, folder=Path(folder)) as before,
            serve(command=command, environment=stub) as now,
        ):
            print(f"Photos: {source}. Machine: {machine()}. Medians of {options.turns} turns.\n")
            columns = ("CPU, ms a photo", "p50, ms", "photos/s")
            heads = " | ".join(f"{column}: before | now | ratio" for column in columns)
            print(f"| photos | clients | {heads} |\n|---" + "|--:" * 10 + "|")
            for load in sent:
                print(compare(before, now, load, options.turns), flush=True)


if __name__ == "__main__":
    main()
