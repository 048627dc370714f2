"""Where a lone request's time goes, by photo size: `python -m benchmarks.latency`.

It starts real servers, sends one photo at a time over HTTP, and prints Markdown tables:

- p50 of the whole request as the client sees it, split into the server's own stages, and everything
  but the network: the whole less `infer`;
- a lone request with batching on and off (`--max-batch 1`), with two servers asked in turn;
- time from process start to ready, whether torch was loaded for it, and the most memory (proc(5):
  VmHWM) with eight photos at once.

Photos are resized from `--images` (default: SLSNET_DATA's native ones) or generated. `--cores 1`
pins server and client to one core each; figures hold for the machine they are printed with.
"""

import argparse
import http.client
import os
import platform
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from common.program import Help
from server.cores import available_cores
from server.observe.stages import STAGES
from tests.support.launch import ServerProcess, serve

SIZES = ((600, 450), (1024, 768), (3024, 2016), (6000, 4000))
JPEG_QUALITY = 92
_TOGETHER = 8
SENSOR_NOISE = 3
"""Standard deviation of the noise in a sample, of 255."""


@dataclass(frozen=True)
class Timing:
    """One request: milliseconds as the client saw it, and those of the server's stages."""

    whole: float
    stages: dict[str, float]

    @property
    def not_network(self) -> float:
        """Milliseconds of everything but inference; the way over the loopback is included."""
        return self.whole - self.stages["infer"]


class Client:
    """One connection that is kept open. It posts the raw image."""

    def __init__(self, server: ServerProcess) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def close(self) -> None:
        """Hang up; no photo can be sent afterwards."""
        self._connection.close()

    def segment(self, photo: bytes, query: str = "") -> Timing:
        """Send one photo, and read its whole mask, or what the query asks for."""
        started = time.perf_counter()
        self._connection.request("POST", f"/segment{query}", photo, {"Content-Type": "image/jpeg"})
        response = self._connection.getresponse()
        body = response.read()
        whole = (time.perf_counter() - started) * 1000
        if response.status != 200:
            raise RuntimeError(body.decode())
        timing = response.headers["Server-Timing"]
        entries = (entry.split(";dur=") for entry in timing.split(", ") if ";dur=" in entry)
        return Timing(whole, {stage: float(value) for stage, value in entries})


def photos_at_all_sizes(image: Path | None) -> dict[tuple[int, int], bytes]:
    """Make a JPEG for each of `SIZES`: the image resized, or a generated one."""
    photos = {}
    source = Image.open(image).convert("RGB") if image else None
    for width, height in SIZES:
        if source is None:
            from tests.support.lesions import lesion_photo

            picture = Image.fromarray(lesion_photo(3, width, height).pixels)
        else:
            picture = source.resize((width, height), Image.Resampling.LANCZOS)
        # An enlarged picture is smoother than one from a sensor of that size, and its JPEG decodes
        # faster. Noise brings it nearer to a camera's bytes a pixel.
        noise = np.random.default_rng(0).normal(0, SENSOR_NOISE, (height, width, 1))
        grainy = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(grainy).save(buffer, "JPEG", quality=JPEG_QUALITY)
        photos[width, height] = buffer.getvalue()
    return photos


def stage_table(server: ServerProcess, photos: dict[tuple[int, int], bytes], count: int) -> str:
    """Make a Markdown table of p50 by photo size and stage."""
    client = Client(server)
    lines = [
        f"| photo | JPEG, MB | whole | {' | '.join(STAGES)} | not the network | of the whole |",
        "|---|---" + "|--:" * (len(STAGES) + 3) + "|",
    ]
    for (width, height), photo in photos.items():
        client.segment(photo)
        timings = [client.segment(photo) for _ in range(count)]
        stages = [_p50([timing.stages[stage] for timing in timings]) for stage in STAGES]
        whole = _p50([timing.whole for timing in timings])
        rest = _p50([timing.not_network for timing in timings])
        lines.append(
            f"| {width}×{height} | {len(photo) / 1e6:.1f} | {whole:.1f} | "
            + " | ".join(f"{stage:.1f}" for stage in stages)
            + f" | **{rest:.1f}** | {rest / whole:.0%} |"
        )
    return "\n".join(lines)


def batching_table(flags: Sequence[str], photo: bytes, count: int) -> str:
    """Make a Markdown table of a lone request with batching on and off, asked in turn."""
    with serve(*flags) as batching, serve(*flags, "--max-batch", "1") as single:
        clients = {"on": Client(batching), "off": Client(single)}
        timings: dict[str, list[Timing]] = {name: [] for name in clients}
        for turn in range(count + 1):
            for name in clients if turn % 2 else reversed(clients):
                timing = clients[name].segment(photo)
                if turn:
                    timings[name].append(timing)
    lines = ["| batching | whole | queue |", "|---|--:|--:|"]
    whole = {name: _p50([timing.whole for timing in series]) for name, series in timings.items()}
    for name, series in timings.items():
        queue = _p50([timing.stages["queue"] for timing in series])
        lines.append(f"| {name} | {whole[name]:.2f} | {queue:.2f} |")
    lines.append(f"| ratio | **{whole['on'] / whole['off']:.3f}** | |")
    return "\n".join(lines)


def start_table(flags: Sequence[str], photo: bytes, count: int) -> str:
    """Make a table of start to ready, what was loaded, and what eight photos at once take."""
    seconds = []
    torch_loaded = False
    peak_mib = 0
    for _ in range(count):
        with serve(*flags) as server, ThreadPoolExecutor(_TOGETHER) as threads:
            seconds.append(server.seconds_to_ready)
            clients = [Client(server) for _ in range(_TOGETHER)]
            list(threads.map(lambda client: client.segment(photo), clients))
            for client in clients:
                client.close()
            process = Path(f"/proc/{server.process.pid}")
            if process.exists():
                torch_loaded |= has_torch((process / "maps").read_text(encoding="utf-8"))
                status = (process / "status").read_text(encoding="utf-8")
                peak_mib = max(peak_mib, int(status.partition("VmHWM:")[2].split()[0]) // 1024)
    return "\n".join(
        [
            "| ready after, s (p50) | worst | torch loaded | peak with eight photos, MiB |",
            "|--:|--:|---|--:|",
            f"| **{_p50(seconds):.2f}** | {max(seconds):.2f} | {'yes' if torch_loaded else 'no'} |"
            f" {peak_mib} |",
        ]
    )


def has_torch(maps: str) -> bool:
    """Whether memory maps (proc(5)) show that a process has PyTorch's libraries in it."""
    return any(line.rpartition("/")[2].startswith("libtorch") for line in maps.splitlines())


def machine() -> str:
    """Describe the machine of the figures."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    load = os.getloadavg()[0]
    return f"{name}, {available_cores()} cores, Python {platform.python_version()}, load {load:.1f}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=Help,
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; the largest is taken")
    parser.add_argument(
        "--requests", type=int, default=30, help="requests that are measured, for each size"
    )
    parser.add_argument("--starts", type=int, default=5, help="servers started for time to ready")
    parser.add_argument("--cores", type=int, help="run on this many cores only")
    parser.add_argument("flags", nargs="*", help="more flags for the server, after --")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.cores]))
    default = Path(os.environ.get("SLSNET_DATA", "../shared/data")) / "native"
    image = largest(options.images or default)
    if options.images and image is None:
        parser.error(f"--images: {options.images} holds no .jpg")
    photos = photos_at_all_sizes(image)
    print(f"Photos: {f'the largest in {image.parent}, resized' if image else 'generated'}.")
    print(
        f"Machine: {machine()}. Milliseconds, p50 of {options.requests}, one request at a time.\n"
    )
    with serve(*options.flags) as server:
        print(stage_table(server, photos, options.requests), flush=True)
    print("\nA lone 1024×768 photo with batching on and off, in turn:\n")
    print(batching_table(options.flags, photos[1024, 768], 2 * options.requests), flush=True)
    print("\nProcess start to ready:\n")
    print(start_table(options.flags, photos[1024, 768], options.starts))


def largest(folder: Path) -> Path | None:
    """The JPEG of a folder with the most bytes; None if there is none."""
    return max(folder.glob("*.jpg"), key=lambda file: file.stat().st_size, default=None)


def _p50(values: Sequence[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
