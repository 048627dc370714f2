"""Hostile photos: real encodings, damaged at random, must either decode or be refused.

    python -m benchmarks.fuzz --images 20000 [--photos FOLDER]
    python -m benchmarks.fuzz --images 5000 --phones

Seeds are photos in all formats and many modes, generated ones and those of a folder. Each image is
one of them, with bytes flipped, cut, repeated, exchanged or spliced with another's. It passes if
`read_photo` gives the network's pixels or raises an ImageError within two seconds of CPU. Memory
must be back where it was after the first tenth. Before them come files that are made to ask a
decoder for minutes or gigabytes. Each has to be refused within those seconds, and none may raise
the process's peak by more than 256 MiB. A crash of the process ends the run with its signal, and a
hang ends it with a traceback. `--seed` and the printed number make an image again.

With `--phones` the seeds are AVIF and HEIC, as far as their libraries are here. Each is decoded by
a process of its own, fifty a second, whose memory must stay below 512 MiB.
"""

import argparse
import ctypes
import faulthandler
import gc
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.program import Help
from photos.image import FORMATS, MODEL_SIZE, ImageError, read_photo
from photos.processes import parent as processes
from server.observe.logs import silence_libtiff
from tests.support.attacks import attacks
from tests.support.lesions import encode_photo, lesion_photo
from tests.support.phones import FORMATS as PHONE_FORMATS
from tests.support.phones import encode_phone, is_here, turned

_SLOW_S = 2.0
_MOST_PEAK_MIB = 256.0
_HANG_S = 60.0
_MOST_GROWTH_MIB = 16.0
_MOST_CHILD_MIB = 512.0
_MAX_PIXELS = 4_000_000
_INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00")


class Report:
    """The outcome of the run."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        """CPU seconds of the image that took longest."""
        self.growth_mib = 0.0
        """Growth of the process's memory after the first tenth."""
        self.child_mib = 0.0
        """Most memory of a process that decodes."""


def seeds(folder: Path | None = None) -> list[bytes]:
    """Make small photos in every format that is served, and in unusual modes of each.

    Args:
        folder: folder of JPEG photos that are taken too, as they are and made small.
    """
    photos = [lesion_photo(seed, 96, 80).pixels for seed in range(2)]
    files = sorted(folder.glob("*.jpg"))[:8] if folder else []
    photos += [_made_small(file) for file in files]
    encoded = [file.read_bytes() for file in files]
    for pixels in photos:
        encoded += [encode_photo(pixels, name) for name in FORMATS]
        encoded.append(encode_photo(pixels, "JPEG", progressive=True))
        encoded.append(encode_photo(pixels, "JPEG", mode="CMYK", orientation=6))
        encoded.append(encode_photo(pixels, "JPEG", mode="L"))
        encoded.append(encode_photo(pixels, "PNG", mode="RGBA"))
        encoded.append(encode_photo(pixels, "PNG", mode="P", orientation=3))
        encoded.append(encode_photo(pixels, "PNG", mode="1"))
        encoded.append(encode_photo(pixels, "WEBP", lossless=True))
        encoded.append(encode_photo(pixels, "TIFF", compression="tiff_lzw"))
        encoded.append(encode_photo(pixels, "TIFF", compression="jpeg"))
        encoded.append(encode_photo(pixels, "TIFF", mode="CMYK", compression="tiff_adobe_deflate"))
        encoded.append(encode_photo(pixels, "BMP", mode="P"))
    return encoded


def phone_seeds() -> list[bytes]:
    """Make small photos as phones store them, and in unusual modes."""
    encoded: list[bytes] = []
    for name in filter(is_here, PHONE_FORMATS):
        pixels = lesion_photo(1, 96, 80).pixels
        plain = encode_phone(pixels, name)
        encoded += [plain, turned(plain, 1, 0), encode_phone(pixels[..., 0].copy(), name)]
        encoded.append(encode_phone(np.dstack([pixels, pixels[..., 1]]), name))
        encoded.append(encode_phone(lesion_photo(2, 600, 500).pixels, name))
    return encoded


def _made_small(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as photo:
        return np.asarray(photo.convert("RGB").resize((96, 80)))


def mutated(originals: list[bytes], choose: random.Random) -> Iterator[bytes]:
    """Yield damaged images without end."""
    while True:
        data = bytearray(choose.choice(originals))
        for _ in range(choose.choice((1, 1, 2, 4, 16))):
            _damage(data, originals, choose)
        yield bytes(data)


def _damage(data: bytearray, originals: list[bytes], choose: random.Random) -> None:
    if not data:
        return
    # The start of a file is damaged more often, since headers decide more than pixels do.
    reach = choose.choice((64, 512, len(data)))
    at = choose.randrange(min(reach, len(data)))
    kind = choose.randrange(6)
    if kind == 0:
        data[at] ^= 1 << choose.randrange(8)
    elif kind == 1:
        data[at] = choose.randrange(256)
    elif kind == 2:
        value = choose.choice(_INTERESTING)
        data[at : at + len(value)] = value
    elif kind == 3:
        del data[at : at + choose.choice((1, 2, 4, 100, len(data)))]
    elif kind == 4:
        data[at:at] = data[at : at + choose.choice((1, 4, 64, 1000))]
    else:
        other = choose.choice(originals)
        start = choose.randrange(len(other))
        length = choose.choice((4, 64, 1000))
        data[at : at + length] = other[start : start + length]


def fuzz(images: int, seed: int, folder: Path | None = None, *, phones: bool = False) -> Report:
    """Try this many images, of phones' formats alone if so. The report says what went wrong."""
    choose = random.Random(seed)
    report = Report()
    source = mutated(phone_seeds() if phones else seeds(folder), choose)
    baseline = 0.0
    earlier_children_mib = _children_mib()
    if not phones:
        _attack(report)
    for number in range(images):
        data = next(source)
        faulthandler.dump_traceback_later(_HANG_S, exit=True)
        started = time.thread_time()
        try:
            photo = read_photo(data, max_pixels=_MAX_PIXELS)
        except ImageError as error:
            report.outcomes[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001
            report.wrong.append(f"image {number}: {error!r}")
        else:
            report.outcomes["decoded"] += 1
            if photo.pixels.shape != (MODEL_SIZE, MODEL_SIZE, 3):
                report.wrong.append(f"image {number}: {photo.pixels.shape}")
        taken_s = time.thread_time() - started
        report.slowest_s = max(report.slowest_s, taken_s)
        if taken_s > _SLOW_S:
            report.wrong.append(f"image {number}: took {taken_s:.1f} s")
        if number == images // 10:
            baseline = _memory_mib()
    faulthandler.cancel_dump_traceback_later()
    report.growth_mib = _memory_mib() - baseline
    if report.growth_mib > _MOST_GROWTH_MIB:
        report.wrong.append(f"memory grew by {report.growth_mib:.1f} MiB")
    # What has forked the others tells of them when it ends.
    processes.close()
    children_mib = _children_mib()
    # The most that any child ever took is known, and not which one it was. A child counts what its
    # parent held when it was started, too (getrusage(2), execve(2)).
    own_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report.child_mib = children_mib if children_mib > max(earlier_children_mib, own_mib) else 0.0
    if report.child_mib > _MOST_CHILD_MIB:
        report.wrong.append(f"a decoder took {report.child_mib:.0f} MiB")
    return report


def _attack(report: Report) -> None:
    for name, data in attacks().items():
        faulthandler.dump_traceback_later(_HANG_S, exit=True)
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.thread_time()
        try:
            read_photo(data)
        except ImageError:
            report.outcomes["attack refused"] += 1
        except Exception as error:  # noqa: BLE001
            report.wrong.append(f"{name}: {error!r}")
        else:
            report.wrong.append(f"{name}: decoded")
        taken_s = time.thread_time() - started
        report.slowest_s = max(report.slowest_s, taken_s)
        if taken_s > _SLOW_S:
            report.wrong.append(f"{name}: took {taken_s:.1f} s")
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib) / 1024
        if grown_mib > _MOST_PEAK_MIB:
            report.wrong.append(f"{name}: took {grown_mib:.0f} MiB")


def _children_mib() -> float:
    """The most memory that a child of this process ever took."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def _memory_mib() -> float:
    """Memory of this process now, without what it merely has not given back yet."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        formatter_class=Help, prog="python -m benchmarks.fuzz", description=__doc__
    )
    parser.add_argument("--images", type=int, default=20_000, help="how many files to make")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--phones", action="store_true", help="make AVIF and HEIC instead")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photos to damage, too")
    given = parser.parse_args()
    silence_libtiff()
    started = time.perf_counter()
    report = fuzz(given.images, given.seed, given.photos, phones=given.phones)
    for outcome, count in report.outcomes.most_common():
        print(f"{outcome:24} {count}")
    print(
        f"{given.images} images, seed {given.seed}, {time.perf_counter() - started:.0f} s;"
        f" slowest {report.slowest_s * 1000:.0f} ms; memory grew by {report.growth_mib:.1f} MiB;"
        f" decoders took up to {report.child_mib:.0f} MiB"
    )
    print("\n".join(report.wrong))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
