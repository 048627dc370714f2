"""The page at `/`, clicked through in a real browser, at a desk's and at a phone's width."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from photos.image import lesion_mask
from photos.masks import coco_rle, measure
from photos.regions import largest_part, largest_region
from tests.support.answers import read_png
from tests.support.launch import ServerProcess
from tests.support.lesions import UNDONE, drawn_photo, lesion_photo
from tests.support.offline import Offline
from tests.support.page import NEEDS_BROWSER, Page, browse
from tests.support.probabilities import faint

pytestmark = NEEDS_BROWSER

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " media-src blob:; connect-src 'self'; manifest-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)


@pytest.fixture(scope="module", params=["desktop", "phone"])
def page(
    request: pytest.FixtureRequest, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    downloads = tmp_path_factory.mktemp("downloads")
    with browse(server.url, downloads, phone=request.param == "phone") as page:
        yield page


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "lesion.jpg"
    path.write_bytes(drawn_photo(7, 900, 600))
    return path


def test_policy_lets_nothing_in_from_elsewhere(server: ServerProcess) -> None:
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-security-policy"] == POLICY
    assert "style=" not in page.text and "http://" not in page.text and "https://" not in page.text
    assert httpx.get(f"{server.url}/page/nothing.js").status_code == 404
    assert httpx.get(f"{server.url}/page/..%2F__main__.py").status_code == 404


def test_a_photo_is_chosen_and_its_mask_shown_and_saved(
    page: Page, photo: Path, offline: Offline
) -> None:
    page.open()
    assert not page.find("result").is_displayed()
    assert "Not a medical device" in page.driver.find_element(By.TAG_NAME, "footer").text
    page.find("choose").send_keys(str(photo))
    page.until_done()

    data = photo.read_bytes()
    expected = httpx.post(
        f"{page.url}/segment", content=data, params={"format": "json"}, timeout=600
    ).json()
    quality, expected = expected["quality"], expected["lesion"]
    assert page.text("quality") == f"{quality['jaccard']:.2f}, {quality['grade']}"
    assert page.text("percent") == f"{expected['area_fraction'] * 100:.1f}"
    assert page.text("area") == f"{expected['area']:,} px"
    assert page.text("dimensions") == "900 × 600 px"
    assert page.text("percent") in page.run(
        "return document.getElementById('announce').textContent"
    )
    for stage in ("read", "decode", "queue", "infer", "encode", "total"):
        assert stage in page.text("stages")
    # The contour lies where the lesion is in the photo, whatever the window's shape.
    outline = page.outline()
    x, y, width, height = expected["bounding_box"]
    assert outline == pytest.approx(
        {"x": x / 900, "y": y / 600, "width": width / 900, "height": height / 600}, abs=0.01
    )

    page.find("download").click()
    saved = page.downloaded("lesion-mask.png")
    assert (read_png(saved) != offline.mask(data)).mean() < 1e-3

    width_on_screen = page.run("return document.documentElement.scrollWidth - innerWidth")
    assert width_on_screen <= 0
    assert page.find("stage").is_displayed()


def test_a_picture_that_is_no_dermoscopic_photo_is_told_of(page: Page, tmp_path: Path) -> None:
    page.open()
    page.find("example").send_keys(Keys.ENTER)
    page.until_done()
    assert not page.find("unfit").is_displayed()
    cap = tmp_path / "cap.png"
    Image.new("RGB", (300, 200)).save(cap)
    page.open()
    page.find("choose").send_keys(str(cap))
    page.until_done()
    assert "no dermoscopic photo" in page.text("unfit")


def test_threshold_and_views_by_keyboard(page: Page) -> None:
    page.open()
    page.find("example").send_keys(Keys.ENTER)
    page.until_done()
    at_half = float(page.text("percent"))
    assert page.find("quality").is_displayed()
    slider = page.find("threshold")
    slider.send_keys(Keys.HOME)
    assert page.text("threshold-value") == "0.05"
    page.until(lambda: page.state() == "done" and float(page.text("percent")) > at_half)
    # It is known of the mask at one half only.
    assert not page.find("quality").is_displayed()

    # Colours matter: nothing is tinted unless asked for.
    assert page.find("stage").get_attribute("data-view") == "outline"
    assert not page.find("shade").is_displayed()
    assert page.find("contour").is_displayed()
    outline = page.driver.find_element(By.CSS_SELECTOR, "input[value=outline]")
    outline.send_keys(Keys.ARROW_LEFT)
    assert page.find("stage").get_attribute("data-view") == "overlay"
    assert page.find("shade").is_displayed()


def test_the_band_is_where_the_border_may_lie(page: Page, photo: Path) -> None:
    page.open()
    page.find("choose").send_keys(str(photo))
    page.until_done()
    assert not page.find("band").get_attribute("d")
    page.find("borders").send_keys(Keys.SPACE)
    page.until(lambda: page.find("band").get_attribute("d"))

    answer = httpx.post(
        f"{page.url}/segment/json",
        content=photo.read_bytes(),
        params={"borders": "true", "mask": "polygons"},
        timeout=600,
    ).json()
    tight, generous = (
        np.array([at for polygon in answer["borders"][name]["polygons"] for at in polygon[0]])
        for name in ("tight", "generous")
    )
    band = page.run(
        "const { x, y, width, height } = document.getElementById('band').getBBox();"
        "return [x, y, x + width, y + height]"
    )
    assert band == pytest.approx([*generous.min(0), *generous.max(0)], abs=2)
    nearest = np.argmin(np.hypot(*(generous - tight[0]).T))
    points = [tight.mean(0), [1, 1], (tight[0] + generous[nearest]) / 2]
    is_in = page.run(
        "const band = document.getElementById('band');"
        "return arguments[0].map(([x, y]) => band.isPointInFill(new DOMPoint(x, y)))",
        np.array(points).tolist(),
    )
    assert is_in == [False, False, True]
    page.find("borders").send_keys(Keys.SPACE)
    page.until(lambda: not page.find("band").get_attribute("d"))


def test_clean_leaves_one_outline(page: Page, two_lesions: bytes, tmp_path: Path) -> None:
    photo = tmp_path / "two.png"
    photo.write_bytes(two_lesions)
    page.open()
    page.find("choose").send_keys(str(photo))
    page.until_done()

    def outlines() -> int:
        return (page.find("contour").get_attribute("d") or "").count("M")

    assert outlines() >= 2
    page.find("clean").send_keys(Keys.SPACE)
    page.until(lambda: page.state() == "done" and outlines() == 1)


def with_exif(image: Image.Image, name: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, name, exif=exif.tobytes())


def with_xmp(image: Image.Image, name: str, orientation: int) -> bytes:
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
        f' tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    )
    told = PngInfo()
    told.add_itxt("XML:com.adobe.xmp", xmp)
    return encoded(image, name, xmp=xmp.encode(), pnginfo=told)


def with_exif_behind_pixels(image: Image.Image, name: str, orientation: int) -> bytes:
    data = with_exif(image, name, orientation)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    return data[:start] + data[start + len(chunk) : end] + chunk + data[end:]


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, quality=95, **options)
    return buffer.getvalue()


# At one width: what is turned is the photo, wherever it is shown.
@pytest.mark.parametrize("page", ["phone"], indirect=True)
@pytest.mark.parametrize(
    ("store", "name", "orientations"),
    [
        (with_exif, "JPEG", (1, 2, 3, 4, 5, 6, 7, 8)),
        (with_exif, "WEBP", (3, 6)),
        (with_exif, "PNG", (5, 8)),
        (with_exif_behind_pixels, "PNG", (2, 6)),
        (with_xmp, "JPEG", (4, 6)),
        (with_xmp, "WEBP", (7, 8)),
        (with_xmp, "PNG", (3, 8)),
    ],
)
def test_photo_and_outline_agree_whatever_says_how_it_lies(
    page: Page,
    tmp_path: Path,
    store: Callable[[Image.Image, str, int], bytes],
    name: str,
    orientations: tuple[int, ...],
) -> None:
    pixels = lesion_photo(7, 450, 300).pixels.copy()
    # So that no two ways to lay it look alike.
    pixels[:80, :80], pixels[:80, -80:] = (200, 0, 0), (0, 150, 0)
    photo = Image.fromarray(pixels)
    page.open()
    for orientation in orientations:
        undo = UNDONE[orientation]
        data = store(photo.transpose(undo) if undo is not None else photo, name, orientation)
        path = tmp_path / f"{orientation}.{name.lower()}"
        path.write_bytes(data)
        told = httpx.post(f"{page.url}/segment/json", content=data).json()
        assert told["image"] == {"width": 450, "height": 300, "orientation": orientation}
        page.find("choose").send_keys(str(path))
        page.until(lambda: page.state() == "busy" or page.state() == "done")
        page.until_done()
        page.until(lambda: page.text("area") == f"{told['lesion']['area']:,} px")  # noqa: B023
        x, y, width, height = told["lesion"]["bounding_box"]
        assert page.outline() == pytest.approx(
            {"x": x / 450, "y": y / 300, "width": width / 450, "height": height / 300}, abs=0.015
        )
        page.run("document.querySelector('input[value=photo]').click()")
        with Image.open(io.BytesIO(page.find("picture").screenshot_as_png)) as shown:
            shot = shown.convert("RGB").resize((45, 30), Image.Resampling.BOX)
        expected = np.asarray(photo.resize((45, 30), Image.Resampling.BOX), np.float32)
        assert np.abs(np.asarray(shot, np.float32) - expected).mean() < 8, (name, orientation)
        page.run("document.querySelector('input[value=outline]').click()")


def test_the_pages_largest_region_is_the_servers(page: Page) -> None:
    page.open()
    for seed, (width, height) in enumerate([(128, 128), (640, 480), (301, 777), (90, 61)]):
        levels = np.rint(faint(seed) * 65535).astype("<u2")
        probability = (levels / 65535).astype(np.float32)
        for threshold in (0.0, 0.001, 0.05, 0.5, 0.95):
            packed, area, box, rle = page.driver.execute_async_script(
                """
                const [text, width, height, threshold, done] = arguments;
                import(new URL("page/mask.js", document.baseURI)).then((mask) => {
                  const sent = {width: 128, height: 128, probabilities: text};
                  const map = mask.largestRegion(mask.decode(sent), threshold);
                  const part = mask.largestPart(mask.lesionMask(map, width, height, threshold));
                  const rle = mask.cocoRle(part).counts;
                  done([[...part.bits], part.area, part.box, rle]);
                });
                """,
                *(base64.b64encode(levels.tobytes()).decode(), width, height, threshold),
            )
            own = lesion_mask(largest_region(probability, threshold), width, height, threshold)
            expected = largest_part(own)
            lesion = measure(expected, width)
            assert np.array_equal(np.array(packed, np.uint8), expected.reshape(-1))
            assert (area, tuple(box)) == (lesion.area, lesion.bounding_box)
            assert rle == coco_rle(expected, width)["counts"]


def test_what_the_server_refuses_is_told_and_another_photo_works(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    page.open()
    damaged = tmp_path / "cut.jpg"
    damaged.write_bytes(photo.read_bytes()[:5000])
    page.find("choose").send_keys(str(damaged))
    page.until(lambda: page.state() == "error")
    problem = page.find("problem")
    assert problem.get_attribute("role") == "alert"
    assert page.text("problem-title") == "The server cannot read this photo."
    assert "truncated" in problem.text
    assert "Request " in page.text("problem-id")
    assert not page.find("retry").is_displayed()
    assert not page.find("result").is_displayed()

    page.find("choose").send_keys(str(photo))
    page.until_done()
    assert not problem.is_displayed()
    assert page.find("result").is_displayed()

    # The good one stays where another fails after it.
    shown = page.shown()
    page.find("choose").send_keys(str(damaged))
    page.until(lambda: page.state() == "error")
    assert page.shown() == shown
    assert page.find("result").is_displayed() and page.find("contour").is_displayed()
    assert page.find("problem-kept").is_displayed()
    assert not page.find("retry").is_displayed()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(page: Page, way: str) -> None:
    page.open()
    page.run(
        """
        const [way] = arguments;
        fetch("page/example.jpg").then((response) => response.blob()).then((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "photo.jpg", {type: "image/jpeg"}));
          document.body.dispatchEvent(way === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
        });
        """,
        way,
    )
    page.until_done()
    assert float(page.text("percent")) > 0


def test_a_photo_that_the_browser_cannot_show_gets_its_mask(page: Page, tmp_path: Path) -> None:
    page.open()
    path = tmp_path / "lesion.tiff"
    with Image.open(io.BytesIO(drawn_photo(7, 900, 600))) as image:
        image.save(path)
    page.find("choose").send_keys(str(path))
    page.until_done()
    page.until(page.find("no-preview").is_displayed)
    overlay = page.find("overlay").rect
    assert overlay["width"] / overlay["height"] == pytest.approx(900 / 600, abs=0.02)
    # The word is this photo's, and comes back with it.
    other = path.with_name("other.png")
    other.write_bytes(drawn_photo(3, 640, 480, "PNG"))
    page.find("another").send_keys(str(other))
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    unseen, seen = page.driver.find_elements(By.CSS_SELECTOR, "#strip .tile")
    seen.click()
    page.until(lambda: not page.find("no-preview").is_displayed())
    unseen.click()
    page.until(page.find("no-preview").is_displayed)


def test_an_empty_file_gets_a_word_for_people(page: Page, tmp_path: Path) -> None:
    page.open()
    path = tmp_path / "empty.jpg"
    path.write_bytes(b"")
    page.find("choose").send_keys(str(path))
    page.until(lambda: page.state() == "error")
    assert page.text("problem-detail").startswith("The file is empty")


def test_a_server_that_is_gone_is_told_and_can_be_tried_again(page: Page) -> None:
    page.open()
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/segment*", "*/model*"]})
    page.find("example").click()
    page.until(lambda: page.state() == "error")
    assert "cannot be reached" in page.text("problem")
    # The photo stays; the dot tells of the server.
    assert page.find("photo").is_displayed()
    page.until(lambda: page.find("server").get_attribute("data-ready") == "false")
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.find("retry").click()
    page.until_done()
    page.until(lambda: page.find("server").get_attribute("data-ready") == "true")


def test_slider_and_download_send_nothing_again(
    page: Page, photo: Path, server: ServerProcess
) -> None:
    for old in page.downloads.iterdir():
        old.unlink()
    page.open()
    page.find("choose").send_keys(str(photo))
    page.until_done()
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*"]})
    page.find("threshold").send_keys(Keys.HOME)
    wanted = {"format": "json", "threshold": "0.05"}
    content = photo.read_bytes()
    expected = httpx.post(f"{server.url}/segment", content=content, params=wanted).json()["lesion"]
    page.until(lambda: page.text("percent") == f"{expected['area_fraction'] * 100:.1f}")
    _, _, width, height = expected["bounding_box"]
    assert page.text("box") == f"{width} × {height} px"
    page.find("download").click()
    saved = page.downloaded("lesion-mask.png")
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    theirs = read_png(
        httpx.post(f"{server.url}/segment", content=content, params={"threshold": 0.05}).content
    )
    assert (read_png(saved) != theirs).mean() < 1e-4


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        ("data.setData('text/uri-list', 'https://example.org/a.jpg')", "Only the address"),
        ("data.setData('text/plain', 'a lesion')", "No photo was dropped"),
    ],
    ids=["web image", "text"],
)
def test_a_drop_that_is_no_photo_gets_a_word(page: Page, fill: str, words: str) -> None:
    page.open()
    page.run(
        f"""
        fetch("page/example.jpg").then((response) => response.blob()).then((blob) => {{
          const data = new DataTransfer();
          {fill};
          document.body.dispatchEvent(
            new DragEvent("drop", {{dataTransfer: data, bubbles: true, cancelable: true}}));
        }});
        """
    )
    page.until(page.find("note").is_displayed)
    assert words in page.text("note")


def drop(page: Page, *paths: Path) -> None:
    """As the system's file manager does."""
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.driver.execute_cdp_cmd(
            "Input.dispatchDragEvent", {"type": kind, "x": 150, "y": 300, "data": data}
        )


def test_a_dropped_folder_gets_a_word_and_changes_nothing(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    page.open()
    page.find("choose").send_keys(str(photo))
    page.until_done()
    shown = page.shown()
    drop(page, tmp_path)
    page.until(page.find("note").is_displayed)
    assert "That is a folder" in page.text("note")
    assert page.state() == "done"
    assert page.shown() == shown


def test_several_dropped_photos_are_all_taken_and_the_first_is_shown(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jpg"
    other.write_bytes(drawn_photo(3, 300, 200))
    page.open()
    drop(page, photo, other)
    page.until_done()
    assert page.text("dimensions") == "900 × 600 px"
    page.until(lambda: page.text("progress") == "2 of 2 photos done")
    drop(page, other)
    page.until(lambda: page.text("dimensions") == "300 × 200 px")
    page.until(lambda: page.text("progress") == "3 of 3 photos done")


def test_the_upload_tells_how_far_it_is(page: Page, photo: Path) -> None:
    page.open()
    size = photo.stat().st_size
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": size / 2}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", slow)
    # Watched in the page, as it may be gone before it can be asked for.
    page.run(
        """
        const bar = document.getElementById("upload");
        window.seen = [];
        new MutationObserver(() => bar.hidden || window.seen.push(bar.value)).observe(
          bar, {attributes: true, attributeFilter: ["hidden", "value"]});
        """
    )
    try:
        page.find("choose").send_keys(str(photo))
        page.until_done()
    finally:
        fast = {**slow, "uploadThroughput": -1}
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", fast)
    seen = page.run("return window.seen")
    assert seen == sorted(seen)
    assert [value for value in seen if 0 < value < 1]
    assert not page.find("upload").is_displayed()


def test_everything_that_can_be_focused_has_a_name(page: Page) -> None:
    page.open()
    page.find("example").click()
    page.until_done()
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    roles: dict[str, list[str]] = {}
    for node in tree["nodes"]:
        properties = (
            {item["name"]: item["value"].get("value") for item in node["properties"]}
            if ("properties" in node)
            else {}
        )
        if not node.get("ignored") and properties.get("focusable"):
            roles.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert all(name for names in roles.values() for name in names), roles
    assert "Threshold" in roles["slider"]
    views = ["Overlay", "Outline", "Mask", "Photo", "Compare"]
    assert roles["radio"] == [*views, "Blue on white", "Yellow on black", "White on black"]
    assert "Download mask" in roles["button"]


def test_nothing_was_fetched_from_elsewhere_and_nothing_was_blocked(page: Page) -> None:
    """Runs last: of all that the browser did in this file."""
    page.run("console.error('the last')")
    complaints: list[str] = []

    def all_came() -> bool:
        entries = page.driver.get_log("browser")  # type: ignore[no-untyped-call]
        complaints.extend(one["message"] for one in entries if one["source"] != "network")
        return "the last" in "".join(complaints)

    page.until(all_came)
    assert len(complaints) == 1, complaints
    sent = [
        entry["message"]
        for entry in page.driver.get_log("performance")  # type: ignore[no-untyped-call]
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    assert sent
    for message in sent:
        url = message.partition('"request":')[2].partition('"url":"')[2]
        assert url.startswith((page.url, "blob:", "data:")), url[:100]
