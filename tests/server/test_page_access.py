"""The page for those who do not see it, or not well: axe-core finds nothing serious."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.page import NEEDS_BROWSER, Page, browse

pytestmark = NEEDS_BROWSER


def serious(page: Page) -> list[Any]:
    """What axe-core finds on the page as it is now: rule and elements."""
    pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
    axe = files("axe_playwright_python") / "axe.min.js"
    # Not as a script of the page, which its policy would not let in.
    page.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe.read_text("utf-8")})
    found = page.driver.execute_async_script(
        "const [done] = arguments; axe.run(document).then(({violations}) => done(violations));"
    )
    return [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found
        if one["impact"] in {"serious", "critical"}
    ]


@pytest.fixture(scope="module", params=["desktop", "phone"])
def page(
    request: pytest.FixtureRequest, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    downloads = tmp_path_factory.mktemp("downloads")
    with browse(server.url, downloads, *camera, phone=request.param == "phone") as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, tmp_path: Path, scheme: str) -> None:
    photos = [tmp_path / name for name in ("one.jpg", "two.jpg", "text.jpg")]
    photos[0].write_bytes(drawn_photo(7, 900, 600))
    photos[1].write_bytes(drawn_photo(3, 640, 480))
    photos[2].write_text("no photo")
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.open()
    assert not serious(page)
    page.find("live-camera").click()
    page.until(lambda: page.find("live-contour").get_attribute("d"))
    place = page.find("live-stop").rect
    page.until(page.find("live-unfit").is_displayed)
    # What comes and goes moves no button under the finger.
    assert page.find("live-stop").rect == place
    assert not serious(page)
    page.find("live-stop").click()
    page.find("choose").send_keys("\n".join(map(str, photos)))
    page.until(lambda: page.text("progress") == "2 of 3 photos done, 1 refused")
    page.run("for (const box of document.querySelectorAll('details')) box.open = true")
    page.run("document.querySelector('input[value=points]').click()")
    page.run("document.querySelectorAll('#strip .tile')[2].click()")
    assert page.find("problem").is_displayed()
    assert not serious(page)
    page.run("document.querySelector('input[value=compare]').click()")
    assert not serious(page)
    assert page.run("return document.documentElement.scrollWidth - innerWidth") <= 0
