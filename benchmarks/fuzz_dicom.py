"""Hostile DICOM: real objects, damaged at random, must either decode or be refused.

    python -m benchmarks.fuzz_dicom --images 10000

Seeds are generated photos, small ones, in every way to store pixels that is read. Each image is one
of them, damaged as `benchmarks.fuzz` does. It is decoded by `photos.dicom.decoder` as the server
does, within the same limits of memory and time, by a child of this process: forked, since to start
a process for each would take hours. A child that crashes or runs out of memory costs its photo
only, as in the server; these are counted. The run fails if a child hangs, takes more than 512 MiB,
or ends without a word that the server would understand. `--seed` and the printed number make an
image again.
"""

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from io import BytesIO, TextIOWrapper
from itertools import islice

import numpy as np

from benchmarks.fuzz import mutated
from common.program import Help
from photos.image import MODEL_SIZE
from tests.support.dicom import WAYS, dicom_bytes
from tests.support.lesions import lesion_photo

__all__ = ["Report", "fuzz"]

_MAX_PIXELS = 4_000_000
_MOST_MIB = 512.0
_CPU_S = 10
_HANG_S = 60

# How a child ends.
_DECODED, _REFUSED, _NO_MEMORY, _FAILED, _NO_ANSWER = 0, 10, 3, 1, 11
_OUTCOMES = {
    _DECODED: "decoded",
    _REFUSED: "refused by name",
    _NO_MEMORY: "refused: out of memory",
    _FAILED: "refused: does not decode",
}


class Report:
    """The outcome of the run."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        """CPU seconds of the image that took longest."""
        self.most_mib = 0.0
        """Most memory of a child, with what this process holds."""


def seeds() -> list[bytes]:
    """Make small photos in every way that DICOM is read."""
    pixels = lesion_photo(1, 96, 80).pixels
    grey = pixels[..., 1].copy()
    made = [dicom_bytes(pixels, way) for way in WAYS if way != "jpeg-lossless"]
    made += [dicom_bytes(grey, way) for way in WAYS]
    made.append(dicom_bytes(np.stack([pixels, pixels]), kind="1.2.840.10008.5.1.4.1.1.7.4"))
    deep = grey.astype(np.uint16) << 4
    made.append(dicom_bytes(deep, BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=3000))
    made.append(dicom_bytes(deep, "rle", PixelSpacing=[0.1, 0.1]))
    for twelve in (deep, pixels.astype(np.uint16) << 4):
        made.append(dicom_bytes(twelve, "jpeg-12", BitsStored=12, HighBit=11))
    return made


class _Input(BytesIO):
    """What the decoder reads: the object, and a byte to go on if the server would send one."""

    def __init__(self, data: bytes, output: BytesIO) -> None:
        super().__init__(len(data).to_bytes(8, "little") + data)
        self._output = output

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        if size != 1:
            return super().read(size)
        told = json.loads(self._output.getvalue())
        return b"\n" if told["rows"] * told["columns"] <= _MAX_PIXELS else b""


def _child(data: bytes) -> int:
    """Decode as the server's process does; return how that ended."""
    from photos.dicom import decoder

    output = BytesIO()
    sys.argv = ["decoder", str(MODEL_SIZE), "0", str(_CPU_S)]
    sys.stdin, sys.stdout = TextIOWrapper(_Input(data, output)), TextIOWrapper(output)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    try:
        code = decoder.main()
    except Exception:  # noqa: BLE001 - it would end the process with this code
        return _FAILED
    if code:
        return code
    *said, pixels = output.getvalue().split(b"\n", 2)
    if b'"refused"' in said[-1] or b'"refused"' in said[0] or not pixels:
        return _REFUSED
    return _DECODED if len(pixels) == 3 * MODEL_SIZE**2 else _NO_ANSWER


def _ended(data: bytes) -> tuple[int, float, float]:
    """How a child ended (a signal is negative), its seconds of CPU, and its MiB."""
    pid = os.fork()
    if not pid:
        signal.alarm(_HANG_S)
        try:
            os._exit(_child(data))
        finally:
            os._exit(_NO_ANSWER)
    _, status, used = os.wait4(pid, 0)
    return (
        os.waitstatus_to_exitcode(status),
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024,
    )


def fuzz(images: int, seed: int) -> Report:
    """Try this many images. The report says what went wrong."""
    # Loaded before the first fork, so that no child loads it.
    import photos.dicom.decoder  # noqa: F401

    report = Report()
    source = mutated(seeds(), random.Random(seed))
    for number, data in enumerate(islice(source, images)):
        code, cpu_s, mib = _ended(data)
        report.slowest_s = max(report.slowest_s, cpu_s)
        report.most_mib = max(report.most_mib, mib)
        if code in _OUTCOMES:
            outcome = _OUTCOMES[code]
        elif code == -signal.SIGXCPU:
            outcome = "refused: takes too long"
        elif code < 0 and code != -signal.SIGALRM:
            outcome = f"refused: child ended by {signal.Signals(-code).name}"
        else:
            outcome = "wrong"
            report.wrong.append(f"image {number}: ended with {code}")
        report.outcomes[outcome] += 1
        if mib > _MOST_MIB:
            report.wrong.append(f"image {number}: took {mib:.0f} MiB")
    return report


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        formatter_class=Help, prog="python -m benchmarks.fuzz_dicom", description=__doc__
    )
    parser.add_argument("--images", type=int, default=10_000, help="how many objects to make")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    given = parser.parse_args()
    faulthandler.enable()
    started = time.perf_counter()
    report = fuzz(given.images, given.seed)
    for outcome, count in report.outcomes.most_common():
        print(f"{outcome:40} {count}")
    print(
        f"{given.images} images, seed {given.seed}, {time.perf_counter() - started:.0f} s;"
        f" slowest {report.slowest_s * 1000:.0f} ms of CPU; most {report.most_mib:.0f} MiB"
    )
    print("\n".join(report.wrong))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
