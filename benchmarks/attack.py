"""What hostile photos cost the server, and how long good ones take meanwhile.

    python -m benchmarks.attack
    python -m benchmarks.attack --attackers 4 --seconds 30 -- --workers 2

First it sends each file that is made to cost much, and the largest sound ones that the limits
allow, alone. It prints the server's CPU seconds and its answer, the costliest first. Then one
client sends a good photo again and again, in turn alone and beside attackers who send the costliest
files without a pause. It compares the latencies. Flags of the server follow `--`.
"""

import argparse
import statistics
import sys
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks.percentiles import percentile
from common.program import Help
from common.tables import markdown
from tests.support.attacks import attacks
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo

_COSTLIEST = 3
_TIMEOUT_S = 120


def largest_sound() -> dict[str, bytes]:
    """Photos at the default limit of pixels, in the forms that cost a decoder most."""
    small = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    picture = Image.fromarray(small).resize((8000, 8000), Image.Resampling.BICUBIC)
    # Only sixteen levels, since with more its bytes would pass the limit of a body.
    coarse = picture.point(lambda value: value & 0xF0)
    files = {}
    for name, photo, form, options in (
        ("PNG of 64 megapixels", coarse, "PNG", {"compress_level": 1}),
        ("progressive JPEG of 64 megapixels", picture, "JPEG", {"progressive": True}),
        ("JPEG of 64 megapixels", picture, "JPEG", {}),
        ("LZW TIFF of 64 megapixels", coarse, "TIFF", {"compression": "tiff_lzw"}),
        ("WebP of 64 megapixels", picture.resize((7900, 8000)), "WEBP", {"method": 0}),
    ):
        out = BytesIO()
        photo.save(out, form, **options)
        files[name] = out.getvalue()
    return files


def costs(server: ServerProcess, files: dict[str, bytes]) -> list[tuple[float, str, int]]:
    """CPU seconds, name and status of each file when it is sent alone; the costliest first."""
    found = []
    with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S) as client:
        for name, data in files.items():
            before = server.cpu_s()
            status = client.post("/segment", content=data).status_code
            found.append((server.cpu_s() - before, name, status))
    return sorted(found, reverse=True)


def latencies_ms(server: ServerProcess, photo: bytes, seconds: float) -> tuple[list[float], int]:
    """Latencies of good photos, one after the other, and how many got no mask."""
    taken, failed = [], 0
    until = time.perf_counter() + seconds
    with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S) as client:
        while time.perf_counter() < until:
            started = time.perf_counter()
            answer = client.post("/segment", content=photo)
            taken.append(1000 * (time.perf_counter() - started))
            failed += answer.status_code != 200
    return taken, failed


def _attack(
    server: ServerProcess, files: list[bytes], stop: threading.Event, statuses: Counter[int]
) -> None:
    with httpx.Client(base_url=server.url, timeout=_TIMEOUT_S) as client:
        while not stop.is_set():
            for data in files:
                statuses[client.post("/segment", content=data).status_code] += 1
                if stop.is_set():
                    return


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code, which is 1 if a good photo did not get its mask."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument(
        "--attackers", type=int, default=1, help="clients that attack at the same time"
    )
    parser.add_argument("--seconds", type=float, default=8, help="length of each turn")
    parser.add_argument("--turns", type=int, default=3, help="turns alone, and beside attackers")
    parser.add_argument("--photo", type=Path, help="the good photo (default: one that is drawn)")
    parser.add_argument("flags", nargs="*", help="flags for the server, after --")
    options = parser.parse_args(argv)
    photo = options.photo.read_bytes() if options.photo else drawn_photo(0, 600, 450)
    files = attacks() | largest_sound()
    with serve(*options.flags) as server:
        latencies_ms(server, photo, 1)
        found = costs(server, files)
        print("| file | bytes | answer | CPU, s |\n|---|--:|--:|--:|")
        for cpu_s, name, status in found[:12]:
            print(f"| {name} | {len(files[name])} | {status} | {cpu_s:.2f} |")
        print(f"\n{len(found)} files; the others cost {found[12][0]:.2f} s of CPU or less.\n")
        worst = [files[name] for _, name, _ in found[:_COSTLIEST]]
        quiet: list[list[float]] = []
        beside: list[list[float]] = []
        failed = 0
        statuses: Counter[int] = Counter()
        for _ in range(options.turns):
            taken, wrong = latencies_ms(server, photo, options.seconds)
            quiet.append(taken)
            failed += wrong
            stop = threading.Event()
            attackers = [
                threading.Thread(target=_attack, args=(server, worst, stop, statuses))
                for _ in range(options.attackers)
            ]
            for attacker in attackers:
                attacker.start()
            taken, wrong = latencies_ms(server, photo, options.seconds)
            stop.set()
            beside.append(taken)
            failed += wrong
            for attacker in attackers:
                attacker.join()
    print(_table(quiet, beside, failed))
    answered = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    print(f"\n{options.attackers} attackers, answered {answered}.")
    return int(failed > 0)


def _table(quiet: list[list[float]], beside: list[list[float]], failed: int) -> str:
    """Latencies of good photos, ms by turn, alone and beside the attack."""
    rows = []
    for name, turns in (("alone", quiet), ("beside the attack", beside)):
        p50, p99 = (
            statistics.median(percentile(taken, share) for taken in turns) for share in (0.5, 0.99)
        )
        rows.append((name, f"{p50:.1f}", f"{p99:.1f}", str(sum(map(len, turns))), ""))
    ratios = [
        statistics.median(
            percentile(b, share) / percentile(q, share) for q, b in zip(quiet, beside, strict=True)
        )
        for share in (0.5, 0.99)
    ]
    rows.append(("ratio", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", "", str(failed)))
    return markdown(("good photos", "p50, ms", "p99, ms", "masks", "other answers"), rows)


if __name__ == "__main__":
    sys.exit(main())
