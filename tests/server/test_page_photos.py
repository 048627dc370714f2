"""Several photos on the page: strip, table, saving; looking closely, measuring, correcting."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support.answers import read_png
from tests.support.dicom import dicom_bytes, needs_dicom
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import drawn_photo, lesion_photo
from tests.support.page import NEEDS_BROWSER, Page, browse

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def page(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browse(server.url, tmp_path_factory.mktemp("downloads")) as page:
        yield page


@pytest.fixture(scope="module")
def phone(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browse(server.url, tmp_path_factory.mktemp("downloads"), phone=True) as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, two of one name, and a text file that calls itself one."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "=one.jpg").write_bytes(drawn_photo(7, 900, 600))
    (folder / "two.jpg").write_bytes(drawn_photo(3, 640, 480))
    (folder / "two.png").write_bytes(drawn_photo(2, 450, 300, "PNG"))
    (folder / "text.jpg").write_text("no photo")
    return folder


def choose(page: Page, *paths: Path) -> None:
    page.open()
    page.find("choose").send_keys("\n".join(str(path) for path in paths))
    page.until_done()


def saved(page: Page, button: str, name: str) -> bytes:
    (page.downloads / name).unlink(missing_ok=True)
    page.find(button).click()
    return page.downloaded(name)


def area(page: Page) -> int:
    return int(page.text("area").replace(",", "").removesuffix(" px"))


def mask_area(page: Page) -> int:
    return int(read_png(saved(page, "download", "lesion-mask.png")).sum())


def seen(page: Page) -> list[float]:
    """What the stage shows of the photo: left, top, width, height."""
    box = page.run("return document.getElementById('overlay').getAttribute('viewBox')")
    return [float(x) for x in box.split()]


def click_at(page: Page, name: str, *points: tuple[float, float]) -> None:
    """Press at the first of these shares of an element, go along the others, and let go."""
    target = page.find(name)
    # All of it, as offsets are from the middle of what is in view.
    page.run("arguments[0].scrollIntoView({block: 'center'})", target)
    width, height = target.rect["width"], target.rect["height"]
    actions = ActionChains(page.driver, duration=20)
    for index, (x, y) in enumerate(points):
        right, down = round((x - 0.5) * width), round((y - 0.5) * height)
        actions.move_to_element_with_offset(target, right, down)
        if index == 0:
            actions.click_and_hold()
    actions.release().perform()


def test_a_folders_photos_are_told_one_by_one_and_saved_together(
    page: Page, folder: Path, server: ServerProcess
) -> None:
    names = ["=one.jpg", "text.jpg", "two.jpg", "two.png"]
    choose(page, *(folder / name for name in names))
    page.until(lambda: page.text("progress") == "3 of 4 photos done, 1 refused")
    tiles = page.driver.find_elements(By.CSS_SELECTOR, "#strip .tile")
    words = [tile.find_element(By.CLASS_NAME, "tile-word").text for tile in tiles]
    refused = "This is not a photo of a kind that the server reads."
    assert words[:3] == ["done", refused, "done"]
    # A refusal that is asked for is told in full; what was found stays.
    tiles[1].click()
    assert page.state() == "error"
    assert "not an image" in page.text("problem-detail")
    assert page.text("dimensions") == "900 × 600 px"
    tiles[2].click()
    assert page.state() == "done"
    assert page.text("dimensions") == "640 × 480 px"

    good = [name for name in names if name != "text.jpg"]
    answers = {
        name: httpx.post(
            f"{server.url}/segment/json?mask=rle", content=(folder / name).read_bytes()
        ).json()
        for name in good
    }
    areas = {name: answer["lesion"]["area"] for name, answer in answers.items()}
    table = page.find("table-box").text
    assert all(f"{area:,} px" in table for area in areas.values())
    assert refused in table

    text = saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    # No spreadsheet takes a name for a formula.
    assert [row["photo"] for row in rows] == ["'=one.jpg", *names[1:]]
    assert [row["area_px"] for row in rows if not row["refused"]] == [
        str(areas[name]) for name in good
    ]
    assert rows[1]["refused"].startswith(refused)
    assert not rows[0]["mm_per_px"]
    assert [(row["expected_jaccard"], row["unfit"]) for row in rows if not row["refused"]] == [
        (f"{answer['quality']['jaccard']:g}", "yes" if answer["fitness"]["unfit"] else "no")
        for answer in answers.values()
    ]

    data = json.loads(saved(page, "save-coco", "lesions-coco.json"))
    assert [image["file_name"] for image in data["images"]] == good
    for note, (name, answer) in zip(data["annotations"], answers.items(), strict=True):
        assert data["images"][note["image_id"] - 1]["file_name"] == name
        assert note["area"] == answer["lesion"]["area"]
        assert note["bbox"] == answer["lesion"]["bounding_box"]
        assert note["segmentation"] == answer["mask"]["rle"]

    with zipfile.ZipFile(io.BytesIO(saved(page, "save-zip", "lesion-masks.zip"))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["=one_mask.png", "two_mask.png", "two-2_mask.png"]
        inside = [int(read_png(archive.read(name)).sum()) for name in archive.namelist()]
    assert inside == list(areas.values())

    page.find("clear").click()
    assert page.state() == "empty"
    assert page.find("choose").is_enabled() and not page.find("result").is_displayed()


def test_a_photo_before_the_others_has_its_figures_in_the_table(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg")
    page.find("another").send_keys(str(folder / "two.jpg"))
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    rows = page.driver.find_elements(By.CSS_SELECTOR, "#table tr")
    for row in rows:
        cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        assert len(cells) == 5 and all(cells), cells


def test_more_photos_than_the_page_takes_are_told(page: Page) -> None:
    page.open()
    page.run(
        """
        const data = new DataTransfer();
        for (let i = 0; i < 501; i++) data.items.add(new File(["x"], `${i}.jpg`));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        """
    )
    assert "500 photos at a time: 1 were left out" in page.text("note")
    page.find("clear").click()


def test_zoom_by_buttons_keys_and_wheel(page: Page, folder: Path) -> None:
    choose(page, folder / "two.jpg")
    assert seen(page) == [0, 0, 640, 480]
    page.find("zoom-in").click()
    assert seen(page) == pytest.approx([320 / 3, 80, 640 / 1.5, 320])
    assert page.text("zoom") == "150 %"
    stage = page.find("stage")
    stage.send_keys("+", "+")
    left, top, width, _ = seen(page)
    assert width == pytest.approx(640 / 1.5**3)
    stage.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert seen(page)[0] > left and seen(page)[1] > top
    # The photo's edge stays outside.
    stage.send_keys(Keys.ARROW_RIGHT * 60)
    assert sum(seen(page)[::2]) == pytest.approx(640)
    stage.send_keys("0")
    assert seen(page) == [0, 0, 640, 480]

    # With the wheel what is under the pointer stays there.
    corner = page.find("overlay").rect
    wheel = {"type": "mouseWheel", "modifiers": 2, "deltaX": 0, "deltaY": -300}
    at = {"x": corner["x"] + 5, "y": corner["y"] - page.run("return scrollY") + 5}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {**wheel, **at})
    page.until(lambda: seen(page)[2] < 640)
    assert seen(page)[:2] == pytest.approx([0, 0], abs=8)
    before = seen(page)
    click_at(page, "overlay", (0.6, 0.6), (0.4, 0.4))
    assert seen(page)[0] > before[0] and seen(page)[1] > before[1]


def test_two_fingers_zoom_and_one_moves(phone: Page, folder: Path) -> None:
    choose(phone, folder / "two.jpg")
    phone.run("document.getElementById('stage').scrollIntoView()")
    box = phone.run("return document.getElementById('overlay').getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind: str, *points: tuple[float, float]) -> None:
        at = [{"x": x + dx, "y": y + dy, "id": i} for i, (dx, dy) in enumerate(points)]
        phone.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    touch("touchStart", (-20, 0))
    touch("touchStart", (-20, 0), (20, 0))
    for apart in (30, 40, 50, 60):
        touch("touchMove", (-apart, 0), (apart, 0))
    touch("touchEnd")
    phone.until(lambda: seen(phone)[2] < 400)
    left = seen(phone)[0]
    assert left > 50
    touch("touchStart", (0, 0))
    for right in (10, 20, 30, 40):
        touch("touchMove", (right, 0))
    touch("touchEnd")
    phone.until(lambda: seen(phone)[0] < left)
    assert phone.run("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_before_and_after_are_either_side_of_the_line(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg")
    assert not page.find("reveal").is_displayed()
    page.run("document.querySelector('input[value=compare]').click()")
    reveal = page.find("reveal")

    def line() -> float:
        assert page.find("marks").get_attribute("clip-path") == "url(#after)"
        x = float(str(page.find("after-part").get_attribute("x")))
        assert str(page.find("divider").get_attribute("d")).startswith(f"M{x:g} ")
        return x

    assert line() == 450
    reveal.send_keys(Keys.HOME)
    assert line() == 0
    reveal.send_keys(Keys.END)
    assert line() == 900
    # On the screen it stays where it is.
    page.find("zoom-in").click()
    left, _, width, _ = seen(page)
    assert line() == pytest.approx(left + width, abs=0.1)
    page.run("document.querySelector('input[value=outline]').click()")
    assert page.find("marks").get_attribute("clip-path") is None


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `rgb(…)`: what eyes see that see no colours."""
    values = [int(x) / 255 for x in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in values]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_every_outline_is_seen_without_seeing_colours(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg")
    for colour in ("blue", "yellow", "white"):
        page.run(f"document.querySelector('input[value={colour}]').click()")
        pair = [
            luminance(page.find(name).value_of_css_property("stroke").replace(" ", ""))
            for name in ("contour", "halo")
        ]
        # So that against anything one of the two has half of that, by its lightness alone.
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 4.5, colour


def test_sizes_of_known_shapes(page: Page) -> None:
    page.open()
    script = """
        const [wide, high, done] = arguments;
        const load = (name) => import(new URL(`page/${name}`, document.baseURI));
        Promise.all([load("mask.js"), load("measure.js")]).then(([mask, {measure}]) => {
          // An ellipse whose edge is a slope, as the network's are.
          const values = Float32Array.from({length: 128 * 128}, (_, i) => {
            const [x, y] = [(i % 128 + 0.5) / 128, (Math.floor(i / 128) + 0.5) / 128];
            return 0.5 + 2 * (1 - Math.hypot((x - 0.5) / wide, (y - 0.5) / high)) * 0.2;
          });
          const map = {width: 128, height: 128, values};
          const sides = [1000, 1000, 0.5];
          done(measure(mask.lesionMask(map, ...sides), mask.outlineRings(map, ...sides)));
        });
    """
    for wide, high in ((0.3, 0.3), (0.4, 0.2)):
        found = page.driver.execute_async_script(script, wide, high)
        a, b = wide * 1000, high * 1000
        # Ramanujan's for the perimeter of an ellipse.
        ratio = 3 * ((a - b) / (a + b)) ** 2
        around = np.pi * (a + b) * (1 + ratio / (10 + np.sqrt(4 - ratio)))
        assert found["area"] == pytest.approx(np.pi * a * b, rel=0.005)
        assert found["diameter"] == pytest.approx(2 * max(a, b), rel=0.005)
        assert found["perimeter"] == pytest.approx(around, rel=0.01)
        assert not found["cut"]


def test_two_clicks_on_the_ruler_give_millimetres(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg", folder / "two.jpg")
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    pixels = area(page)
    page.find("scale-box").click()
    pick = page.find("scale-pick")
    pick.click()
    click_at(page, "overlay", (0.2, 0.2))
    click_at(page, "overlay", (0.2, 0.2))
    assert "the same" in page.text("scale-hint")
    assert area(page) == pixels

    pick.click()
    click_at(page, "overlay", (0.2, 0.2))
    click_at(page, "overlay", (0.6, 0.2))
    page.until(lambda: page.text("area").endswith(" mm²"))
    # 0.4 × 900 pixels are 10 mm.
    scale = float(str(page.find("scale-um").get_attribute("value"))) / 1000
    assert scale == pytest.approx(10 / 360, rel=0.02)
    assert float(page.text("area").removesuffix(" mm²")) == pytest.approx(
        pixels * scale**2, rel=0.01
    )
    assert page.text("diameter").endswith(" mm") and page.text("perimeter").endswith(" mm")

    millimetres = page.find("scale-mm")
    millimetres.clear()
    millimetres.send_keys("0", Keys.TAB)
    assert "above 0" in page.text("scale-hint")
    millimetres.clear()
    millimetres.send_keys("20", Keys.TAB)
    page.until(lambda: page.find("scale-um").get_attribute("value") != f"{scale * 1000:g}")

    rows = csv.DictReader(io.StringIO(saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")))
    assert [bool(row["mm_per_px"]) for row in rows] == [True, False]
    page.find("scale-all").click()
    rows = csv.DictReader(io.StringIO(saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")))
    assert len({row["mm_per_px"] for row in rows}) == 1


def test_what_is_known_of_mask_and_picture_is_told_among_several(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.png"
    Image.new("RGB", (300, 200), "lime").save(odd)
    choose(page, folder / "two.jpg", odd)
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    words = [word.text for word in page.driver.find_elements(By.CLASS_NAME, "tile-word")]
    assert words == ["done", "likely no dermoscopic photo"]

    def columns() -> list[tuple[bool, str]]:
        text = saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text))
        return [(bool(row["expected_jaccard"]), row["unfit"]) for row in rows]

    assert columns() == [(True, "no"), (True, "yes")]
    # What is expected is of the server's own mask.
    page.find("clean").click()
    assert columns() == [(False, "no"), (False, "yes")]


def test_a_dicom_photo_brings_its_scale(page: Page, tmp_path: Path) -> None:
    needs_dicom()
    pixels = lesion_photo(7, 600, 400).pixels
    square, oblong = tmp_path / "square.dcm", tmp_path / "oblong.dcm"
    square.write_bytes(dicom_bytes(pixels, PixelSpacing=[0.02, 0.02]))
    oblong.write_bytes(dicom_bytes(pixels, PixelSpacing=[0.02, 0.04]))
    choose(page, square, oblong)
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    assert page.find("scale-um").get_attribute("value") == "20"
    text = saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert float(rows[0]["area_mm2"]) == pytest.approx(int(rows[0]["area_px"]) * 0.0004, rel=1e-3)
    assert page.text("area") == f"{float(rows[0]['area_mm2']):.1f} mm²"
    # Lengths would depend on their direction.
    assert not rows[1]["mm_per_px"]


def use(page: Page, tool: str) -> None:
    page.run("document.getElementById('edit-box').open = true")
    page.run(f"document.querySelector('input[value={tool}]').click()")


def test_the_brush_corrects_and_undo_takes_it_back(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg")
    found, outline = area(page), page.shown()
    assert not page.find("undo").is_enabled()
    use(page, "add")
    click_at(page, "overlay", (0.05, 0.05), (0.1, 0.05), (0.1, 0.1))
    page.until(lambda: area(page) > found)
    more = area(page)
    assert page.find("edited").is_displayed() and not page.find("threshold").is_enabled()
    assert mask_area(page) == more
    use(page, "remove")
    click_at(page, "overlay", (0.4, 0.5), (0.6, 0.5))
    page.until(lambda: area(page) < more)
    page.find("undo").click()
    page.until(lambda: area(page) == more)
    page.find("undo").click()
    page.until(lambda: page.shown() == outline)
    assert page.find("threshold").is_enabled() and not page.find("undo").is_enabled()

    click_at(page, "overlay", (0.4, 0.5), (0.6, 0.5))
    page.until(lambda: area(page) < found)
    page.find("start-over").click()
    page.until(lambda: page.shown() == outline)


def test_a_points_neighbourhood_follows_it_and_the_rest_stays(page: Page, folder: Path) -> None:
    choose(page, folder / "two.jpg")
    found = area(page)
    use(page, "points")
    points = page.driver.find_elements(By.CSS_SELECTOR, "#handles circle")
    assert len(points) == 24
    assert points[3].accessible_name == "Point 4 of 24"
    areas = [found]
    for key in (Keys.ARROW_LEFT, Keys.ARROW_RIGHT):
        points[3].send_keys(Keys.SHIFT, key * 3, Keys.NULL)
        page.until(lambda: area(page) != areas[-1])
        areas.append(area(page))
    # There and back again, but for the rounding of edges.
    assert areas[2] == pytest.approx(found, rel=0.01)
    assert all(one != other for one, other in pairwise(areas))

    right, down = 60, 60
    ActionChains(page.driver, duration=20).drag_and_drop_by_offset(points[0], right, down).perform()
    page.until(lambda: area(page) != areas[-1])
    assert area(page) == mask_area(page)
    for _ in range(7):
        page.find("undo").click()
    page.until(lambda: area(page) == found)


def test_a_correction_stays_while_another_photo_is_looked_at(page: Page, folder: Path) -> None:
    choose(page, folder / "=one.jpg", folder / "two.jpg")
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    found = area(page)
    use(page, "add")
    click_at(page, "overlay", (0.05, 0.05), (0.1, 0.1))
    page.until(lambda: area(page) > found)
    corrected = area(page)
    tiles = page.driver.find_elements(By.CSS_SELECTOR, "#strip .tile")
    tiles[1].click()
    assert page.text("dimensions") == "640 × 480 px"
    assert not page.find("edited").is_displayed()
    tiles[0].click()
    assert area(page) == corrected
    rows = csv.DictReader(io.StringIO(saved(page, "save-csv", "lesions.csv").decode("utf-8-sig")))
    assert [(row["edited"], row["threshold"]) for row in rows] == [("yes", ""), ("no", "0.5")]


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_page_opens_without_its_server_and_keeps_no_photo(folder: Path, tmp_path: Path) -> None:
    kept = """
        const [done] = arguments;
        caches.keys().then((names) => Promise.all(names.map((name) => caches.open(name)
          .then((cache) => cache.keys())))).then((all) => done(all.flat().map(({url}) => url)));
    """
    with serve() as own, browse(own.url, tmp_path) as page:
        choose(page, folder / "=one.jpg")
        page.until(lambda: page.run("return Boolean(navigator.serviceWorker.controller)"))
        page.driver.refresh()
        page.find("choose").send_keys(str(folder / "two.jpg"))
        page.until_done()
        urls = page.driver.execute_async_script(kept)
        assert f"{own.url}/" in urls
        assert all(url == f"{own.url}/" or url.startswith(f"{own.url}/page/") for url in urls)
        own.terminate()
        own.wait()
        page.driver.refresh()
        page.until(lambda: "cannot be reached" in page.text("server"))
        page.find("example").click()
        page.until(lambda: page.state() == "error")
        assert "cannot be reached" in page.text("problem-title")
        assert page.driver.execute_async_script(kept) == urls


def test_the_page_can_be_installed(page: Page) -> None:
    page.open()
    told = page.driver.execute_cdp_cmd("Page.getAppManifest", {})
    assert told["url"] == f"{page.url}/page/manifest.webmanifest"
    assert not told["errors"]
    manifest = json.loads(told["data"])
    assert manifest["start_url"] == manifest["scope"] == "../"
    page.until(
        lambda: (
            not page.driver.execute_cdp_cmd("Page.getInstallabilityErrors", {})[
                "installabilityErrors"
            ]
        )
    )


def test_ios_has_an_icon_that_it_reads(server: ServerProcess) -> None:
    # It takes no SVG, makes what is clear black, and rounds the corners itself.
    href = re.findall(r'rel="apple-touch-icon" href="([^"]+)"', httpx.get(f"{server.url}/").text)
    icon = Image.open(io.BytesIO(httpx.get(f"{server.url}/{href[0]}").content))
    assert (icon.format, icon.size) == ("PNG", (180, 180))
    assert (np.asarray(icon.convert("RGBA"))[..., 3] == 255).all()
    manifest = httpx.get(f"{server.url}/page/manifest.webmanifest").json()
    assert {"src": "icon.png", "sizes": "180x180"}.items() <= manifest["icons"][1].items()


def test_the_worker_keeps_every_file_and_all_are_light(server: ServerProcess) -> None:
    folder = Path(__file__).parents[2] / "server" / "page"
    # What computes in the browser is kept once it is chosen.
    names = {path.name for path in folder.iterdir() if path.is_file()}
    worker = (folder / "sw.js").read_text()
    kept = worker.partition("FILES = [")[2].partition("]")[0]
    assert {line.strip(' ",') for line in kept.split("\n") if line.strip()} == {
        "./",
        *(f"page/{name}" for name in names - {"index.html", "sw.js"}),
    }
    sent = 0
    for path in ("", "sw.js", *(f"page/{name}" for name in names - {"index.html", "sw.js"})):
        with httpx.stream("GET", f"{server.url}/{path}") as response:
            assert response.status_code == 200, path
            sent += len(b"".join(response.iter_raw()))
    assert sent <= 100_000
