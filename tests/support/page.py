"""The page in a real browser, at a desk's or at a phone's width."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMEDRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

NEEDS_BROWSER = pytest.mark.skipif(
    CHROMEDRIVER is None or CHROMIUM is None,
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)


class Page:
    """The page as a person meets it."""

    def __init__(self, driver: webdriver.Chrome, url: str, downloads: Path) -> None:
        self.driver = driver
        self.url = url
        self.downloads = downloads

    def open(self) -> None:
        self.driver.get(f"{self.url}/")
        self.until(lambda: self.find("server").get_attribute("data-ready") == "true")

    def downloaded(self, name: str) -> bytes:
        """What the browser saves under this name, once it has."""
        path = self.downloads / name
        # It keeps the name with an empty file until all is there.
        self.until(lambda: path.is_file() and path.stat().st_size > 0)
        return path.read_bytes()

    def find(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def state(self) -> str:
        return str(self.run("return document.body.dataset.state"))

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 600, poll_frequency=0.05).until(lambda _: condition())

    def save_picture(self, path: Path, colours: int) -> None:
        """What is shown, as a PNG of so many colours: as small as documents need it."""
        with Image.open(BytesIO(self.driver.get_screenshot_as_png())) as shown:
            shown.convert("RGB").quantize(colours).save(path, optimize=True)

    def until_done(self) -> None:
        self.until(lambda: self.state() == "done")

    def shown(self) -> list[str | None]:
        """Photo, outline and figures."""
        return [
            page_part.get_attribute(name)
            for page_part, name in (
                (self.find("picture"), "href"),
                (self.find("contour"), "d"),
                *((self.find(figure), "textContent") for figure in ("percent", "area", "box")),
            )
        ]

    def outline(self) -> dict[str, float]:
        """The contour's box, in shares of the photo as it is shown."""
        box: dict[str, float] = self.run(
            """
            const photo = document.getElementById("picture").getBoundingClientRect();
            const box = document.getElementById("contour").getBoundingClientRect();
            return {x: (box.x - photo.x) / photo.width, y: (box.y - photo.y) / photo.height,
                    width: box.width / photo.width, height: box.height / photo.height};
            """
        )
        return box


@contextmanager
def browse(
    url: str,
    downloads: Path,
    *arguments: str,
    phone: bool = False,
    settings: dict[str, object] | None = None,
) -> Iterator[Page]:
    """The page of the server at `url`, in a browser of its own.

    Args:
        url: the server's.
        downloads: where the browser saves files.
        arguments: of Chromium's.
        phone: 390 pixels wide, with touch.
        settings: the browser's preferences.
    """
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,900")
    for argument in (*common, *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    saved = {"download.default_directory": str(downloads), **(settings or {})}
    # Several files at once, without a question.
    saved["profile.default_content_setting_values.automatic_downloads"] = 1
    options.add_experimental_option("prefs", saved)
    if phone:
        metrics = {"width": 390, "height": 844, "pixelRatio": 2, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield Page(driver, url, downloads)
    finally:
        driver.quit()
