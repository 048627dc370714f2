"""The network in a browser beside the server, on one machine: `python -m benchmarks.browser SITE`.

SITE is what `python -m server.static` wrote. It starts a server, opens its page in headless
Chromium, and prints Markdown tables: the weight of the page and the time until it can be used; the
time from the choice "on this device" until the network is ready; and for each photo the time in the
browser, the time of the page's request to the server, and the pixels in which the two masks differ.

The two take turns with every photo, so that both meet the same machine. Photos are those of
`--images`, or generated. It needs chromium and chromedriver.
"""

import argparse
import base64
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from common.program import Help
from server.cores import available_cores
from tests.support.answers import read_png
from tests.support.browser import chromium, found_in, mask_of
from tests.support.launch import serve
from tests.support.lesions import drawn_photo

SIZES = ((600, 450), (1024, 768), (2048, 1536), (4000, 3000))

_LOADED = """
    const [page] = performance.getEntriesByType("navigation");
    const all = [page, ...performance.getEntriesByType("resource")];
    return {
      interactive: page.domContentLoadedEventEnd,
      bytes: all.reduce((sum, { encodedBodySize }) => sum + encodedBodySize, 0),
    };
"""

# The request that the page sends.
_ASK = """
    const [photo, done] = arguments;
    const bytes = Uint8Array.from(atob(photo), (character) => character.charCodeAt(0));
    const began = performance.now();
    fetch("segment?format=json&mask=probabilities", { method: "POST", body: new Blob([bytes]) })
      .then((answer) => answer.json())
      .then(() => done(performance.now() - began));
"""


@dataclass(frozen=True)
class Compared:
    """One photo, in the browser and by the server; times are medians in milliseconds."""

    name: str
    pixels: int
    here: float
    decode: float
    infer: float
    server: float
    differing: int


def photos(images: Path | None, limit: int) -> dict[str, bytes]:
    """Photos by name: those of a folder, or generated ones of several sizes."""
    if images is None:
        return {f"{w}×{h}": drawn_photo(seed, w, h) for seed, (w, h) in enumerate(SIZES)}
    paths = sorted(path for path in images.iterdir() if path.suffix in (".jpg", ".jpeg"))
    return {path.stem: path.read_bytes() for path in paths[:limit]}


def compare(driver: webdriver.Chrome, url: str, name: str, photo: bytes, runs: int) -> Compared:
    """Time and compare one photo."""
    answer = httpx.post(f"{url}/segment", content=photo, timeout=60)
    expected = read_png(answer.raise_for_status().content)
    asked = base64.b64encode(photo).decode()
    here, server = [], []
    for _ in range(runs):
        found: dict[str, Any] = found_in(driver, photo)
        here.append(found["milliseconds"])
        server.append(float(driver.execute_async_script(_ASK, asked)))
    middle = {key: statistics.median(one[key] for one in here) for key in here[0]}
    differing = int((mask_of(found) != expected).sum())
    return Compared(
        name,
        expected.size,
        middle["total"],
        middle["decode"],
        middle["infer"],
        statistics.median(server),
        differing,
    )


def opened(driver: webdriver.Chrome, url: str) -> tuple[dict[str, float], float, str]:
    """The page's weight and time; seconds from the choice to a network that is ready; where."""
    driver.get(f"{url}/")
    loaded: dict[str, float] = driver.execute_script(_LOADED)
    wait = WebDriverWait(driver, 120, 0.02)
    box = wait.until(lambda _: driver.find_elements(By.ID, "compute-here"))[0]
    began = time.perf_counter()
    box.click()
    status = driver.find_element(By.ID, "compute-status")
    wait.until(lambda _: "runs here" in status.text)
    return loaded, time.perf_counter() - began, status.text


def table(rows: list[Compared]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| photo | pixels | in the browser, ms | of it decode | network | by the server, ms"
        " | pixels that differ |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.pixels:,} | {row.here:.0f} | {row.decode:.0f} | {row.infer:.0f}"
        f" | {row.server:.0f} | {row.differing} |"
        for row in rows
    ]
    total = sum(row.pixels for row in rows)
    ratio = statistics.median(row.here / row.server for row in rows)
    differing = sum(row.differing for row in rows)
    whole = sum(row.differing == 0 for row in rows)
    lines += [
        "",
        f"{differing:,} of {total:,} pixels differ ({differing / total:.1e}); {whole} of"
        f" {len(rows)} masks are the same in every pixel. In the browser a photo takes"
        f" {ratio:.2f} times as long (median).",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.browser", description=__doc__, formatter_class=Help
    )
    parser.add_argument("site", type=Path, metavar="SITE", help="folder that server.static wrote")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of JPEG photos (default: generated ones)"
    )
    parser.add_argument("--limit", type=int, default=20, help="most photos to take of it")
    parser.add_argument("--runs", type=int, default=5, help="runs of each photo, here and there")
    args = parser.parse_args()
    with serve("--device-dir", str(args.site)) as server:
        loads = []
        for _ in range(3):
            with chromium() as driver:
                loads.append(opened(driver, server.url))
        with chromium() as driver:
            _, _, where = opened(driver, server.url)
            given = photos(args.images, args.limit)
            rows = [
                compare(driver, server.url, name, photo, args.runs) for name, photo in given.items()
            ]
    interactive = statistics.median(load["interactive"] for load, _, _ in loads)
    print(f"{platform.processor() or platform.machine()}, {available_cores()} cores. {where}\n")
    print(
        f"The page weighs {loads[0][0]['bytes'] / 1e3:.0f} kB and can be used after"
        f" {interactive:.0f} ms; the network is ready"
        f" {statistics.median(ready for _, ready, _ in loads):.1f} s after it was chosen.\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
