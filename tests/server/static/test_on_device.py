"""The network in a browser: the server's masks, with and without threads, and without a server."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from server.http.device import FOLDER, LISTING
from server.static.__main__ import check_out, write_site
from server.static.runtime import RuntimeMissingError, fetched
from tests.support import ROOT
from tests.support.browser import FIND, chromium, found_in, mask_of, needs_chromium
from tests.support.firefox import firefox, needs_firefox
from tests.support.launch import ServerProcess, free_port, serve
from tests.support.lesions import drawn_photo, encode_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.plain_host import plain_host
from tests.support.samples import Sample

ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime's package, fetched once."""
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("npm") / "package.tgz"
    try:
        path.write_bytes(fetched())
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture(scope="session")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m server.static` writes."""
    return write(tmp_path_factory.mktemp("site") / "new", package)


def write(out: Path, package: Path) -> Path:
    command = [sys.executable, "-m", "server.static", str(out), "--runtime", str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


class Page:
    """A page that computes in its browser."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(f"{url}/")

    def status(self) -> str:
        return self.driver.find_element(By.ID, "compute-status").text

    def until_ready(self) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda _: "runs here" in self.status())

    def find(self, photo: bytes) -> dict[str, Any]:
        return found_in(self.driver, photo)


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server_with_files(site: Path) -> Iterator[ServerProcess]:
    with serve("--device-dir", str(site)) as process:
        yield process


@pytest.fixture(scope="module")
def page(driver: webdriver.Chrome, server_with_files: ServerProcess) -> Page:
    """The server's page, told to compute on this device."""
    opened = Page(driver)
    opened.open(server_with_files.url)
    driver.find_element(By.ID, "compute-here").click()
    opened.until_ready()
    return opened


@needs_chromium
def test_masks_are_the_servers(page: Page, offline: Offline, photos: list[Sample]) -> None:
    differing = total = 0
    for sample in photos[:4]:
        expected = offline.mask(sample.data)
        mask = mask_of(page.find(sample.data))
        assert mask.shape == expected.shape
        differing += int((mask != expected).sum())
        total += mask.size
    # Browsers decode a JPEG as a whole: a level here and there, where a border is soft.
    assert differing <= 1e-3 * total, f"{differing} of {total} pixels"


@needs_chromium
@pytest.mark.parametrize("name", ["PNG", "WEBP", "BMP", "turned", "profile", "clear", "grey"])
def test_every_kind_of_photo_is_read_as_the_server_reads_it(
    page: Page, offline: Offline, name: str
) -> None:
    picture = Image.fromarray(lesion_photo(11, 500, 380).pixels)
    options: dict[str, Any] = {"lossless": True} if name == "WEBP" else {}
    if name == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif name == "profile":
        options["gamma"] = 1.8
    elif name == "clear":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    elif name == "grey":
        picture = picture.convert("L")
    file = BytesIO()
    picture.save(file, name if name.isupper() else "PNG", **options)
    found = page.find(file.getvalue())
    expected = offline.mask(file.getvalue())
    mask = mask_of(found)
    assert mask.shape == expected.shape
    assert (mask != expected).mean() <= 2e-4


@needs_chromium
def test_it_tells_of_mask_and_picture_as_the_server_does(
    page: Page, server_with_files: ServerProcess
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    pictures = [lesion_photo(11, 500, 380).pixels, lesion_photo(4, 300, 400).pixels]
    framed = np.pad(pictures[0], ((70, 70), (30, 30), (0, 0)))
    for pixels in (*pictures, framed, np.zeros((96, 128, 3), np.uint8), noise):
        photo = encode_photo(pixels, "PNG")
        answer = httpx.post(f"{server_with_files.url}/segment/json", content=photo).json()
        found = page.find(photo)
        assert found["fitness"] == {
            "distance": pytest.approx(answer["fitness"]["distance"], abs=0.002),
            "unfit": answer["fitness"]["unfit"],
        }
        expected = answer["quality"]["jaccard"]
        assert found["quality"]["jaccard"] == pytest.approx(expected, abs=0.005)
        assert found["quality"]["grade"] in {"good", "fair", "poor"}
    levels = httpx.get(f"{server_with_files.url}/model").json()["borders"]
    assert {name: found["borders"][name] for name in ("tight", "generous")} == {
        name: levels[name] for name in ("tight", "generous")
    }


@needs_chromium
def test_what_is_no_photo_gets_a_word_and_the_next_is_found(page: Page) -> None:
    photo = drawn_photo(4)
    for data, status in ((b"no photo", 415), (photo[: len(photo) // 2], 422), (b"", 400)):
        problem = page.find(data)["problem"]
        assert problem["status"] == status and problem["detail"].endswith(".")
    assert page.find(photo)["area"] > 0


@needs_chromium
def test_nothing_of_a_photo_is_sent(page: Page) -> None:
    before = page.driver.execute_script("return performance.getEntriesByType('resource').length")
    page.find(drawn_photo(6))
    entries = page.driver.execute_script(
        "return performance.getEntriesByType('resource').slice(arguments[0]).map((e) => e.name)",
        before,
    )
    assert not [name for name in entries if "/segment" in name.replace("/segment.js", "")]


@needs_chromium
def test_only_the_networks_scripts_may_compile(server_with_files: ServerProcess) -> None:
    url = server_with_files.url
    page = httpx.get(f"{url}/")
    assert "wasm" not in page.headers["content-security-policy"]
    assert page.headers["cross-origin-embedder-policy"] == "require-corp"
    worker = httpx.get(f"{url}/{FOLDER}/worker.js")
    assert "'wasm-unsafe-eval'" in worker.headers["content-security-policy"]
    listing = httpx.get(f"{url}/{FOLDER}/{LISTING}").json()
    network = httpx.get(f"{url}/{FOLDER}/{listing['folder']}/{listing['names']['network']}")
    assert "immutable" in network.headers["cache-control"] and len(network.content) < 5_000_000
    for name in ("nothing.js", f"{listing['folder']}/nothing", "../../index.html", "..%2Fapp.js"):
        assert httpx.get(f"{url}/{FOLDER}/{name}").status_code == 404


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("headers", [{}, ISOLATED], ids=["plain", "isolated"])
def test_any_web_host_will_do_and_then_none(
    site: Path, offline: Offline, headers: dict[str, str]
) -> None:
    photo = drawn_photo(8)
    port = free_port()
    with chromium() as driver:
        page = Page(driver)
        with plain_host(site, headers, port) as url:
            page.open(url)
            page.until_ready()
            assert ("one thread" in page.status()) == (not headers)
            # It promises no format that it refuses.
            hints = driver.find_element(By.CLASS_NAME, "drop").text
            assert "JPEG, PNG, WebP or BMP" in hints and "TIFF" not in hints
            chooser = driver.find_element(By.ID, "choose")
            assert "tiff" not in str(chooser.get_attribute("accept"))
            mask = mask_of(page.find(photo))
            assert (mask != offline.mask(photo)).mean() <= 2e-4
            driver.execute_async_script("navigator.serviceWorker.ready.then(() => arguments[0]())")
            wait_until_kept(driver)
        # The host is gone.
        page.open(url)
        page.until_ready()
        assert np.array_equal(mask_of(page.find(photo)), mask)


def wait_until_kept(driver: webdriver.Chrome) -> None:
    """Until the cache holds all that the network needs."""
    script = """
        const done = arguments[0];
        (async () => {
          const files = await (await fetch("page/device/files.json")).json();
          const folder = `page/device/${files.folder}`;
          const names = [files.names.network, files.names.trial, ...files.runtimes.wasm];
          const kept = await Promise.all(names.map((name) => caches.match(`${folder}/${name}`)));
          return kept.every(Boolean);
        })().then(done, () => done(false));
    """
    WebDriverWait(driver, 60, 0.05).until(lambda _: driver.execute_async_script(script))


@needs_firefox
def test_masks_are_the_servers_in_firefox_too(
    site: Path, offline: Offline, photos: list[Sample], tmp_path: Path
) -> None:
    sent = [photo.data for photo in photos[:2]]
    # The kinds of files that are read apart.
    picture = Image.fromarray(lesion_photo(11, 500, 380).pixels)
    for kind in ("PNG", "WEBP"):
        file = BytesIO()
        picture.save(file, kind, lossless=True)
        sent.append(file.getvalue())
    with plain_host(site, ISOLATED) as url, firefox(tmp_path) as page:
        page.open(f"{url}/")
        page.until("document.getElementById('compute-status').textContent.includes('runs here')")
        for photo in sent:
            encoded = base64.b64encode(photo).decode()
            mask = mask_of(page.run(f"const photo = '{encoded}'; {FIND}"))
            assert (mask != offline.mask(photo)).mean() <= 1e-3


def test_without_files_the_page_does_not_offer_it(server: ServerProcess) -> None:
    page = httpx.get(f"{server.url}/")
    assert FOLDER not in page.text
    assert "cross-origin-embedder-policy" not in page.headers
    assert httpx.get(f"{server.url}/{FOLDER}/{LISTING}").status_code == 404


@needs_chromium
def test_files_of_another_network_are_told(
    site: Path, driver: webdriver.Chrome, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / FOLDER).mkdir(parents=True)
    listing = json.loads((site / FOLDER / LISTING).read_text())
    (other / FOLDER / listing["folder"]).symlink_to(site / FOLDER / listing["folder"])
    listing["network"]["weights_sha256"] = "0" * 64
    (other / FOLDER / LISTING).write_text(json.dumps(listing))
    with serve("--device-dir", str(other)) as server:
        page = Page(driver)
        page.open(server.url)
        driver.find_element(By.ID, "compute-here").click()
        page.until_ready()
        assert "another network" in page.status()


def test_a_folder_that_is_not_whole_is_told_at_the_start(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / FOLDER).mkdir(parents=True)
    (other / FOLDER / LISTING).write_bytes((site / FOLDER / LISTING).read_bytes())
    for folder, word in ((other, "missing"), (tmp_path / "absent", "python -m server.static")):
        command = [sys.executable, "-m", "server", "--port", "0", "--device-dir", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr


def test_it_writes_over_its_own_output_only(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "server.static", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is there" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # What it goes on with where it wrote before.
    check_out(site)
    before = {path.relative_to(site) for path in site.rglob("*")}
    found = {str(path): (site / path).read_bytes() for path in before if (site / path).is_file()}
    (site / FOLDER / "0123456789abcdef").mkdir()
    write_site(site, found)
    assert {path.relative_to(site) for path in site.rglob("*")} == before
