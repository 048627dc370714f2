"""Headless Chromium, where this machine has it."""

import base64
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from selenium import webdriver

__all__ = ["FIND", "chromium", "found_in", "mask_of", "needs_chromium"]

_DRIVER = shutil.which("chromedriver")
_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(
    _DRIVER is None or _BROWSER is None,
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)


FIND = """
    const { segment } = await import(new URL("page/segment.js", document.baseURI));
    const { lesionMask } = await import(new URL("page/mask.js", document.baseURI));
    const bytes = Uint8Array.from(atob(photo), (character) => character.charCodeAt(0));
    const { map, size, ...told } = await segment(new Blob([bytes]), {});
    const { bits, area } = lesionMask(map, size.width, size.height, 0.5);
    let text = "";
    for (const byte of bits) text += String.fromCharCode(byte);
    return { ...told, bits: btoa(text), size, area, values: [...map.values] };
"""
"""Runs `photo`, in base64, through the page's modules: here, or by the server if there is one."""

_ASKED = f"""
    const [photo, done] = arguments;
    (async () => {{ {FIND} }})()
      .then(done, ({{ status, detail }}) => done({{ problem: {{ status, detail }} }}));
"""


@contextlib.contextmanager
def chromium(*arguments: str, downloads: Path | None = None) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own.

    Args:
        arguments: of the browser, beside those that it needs here.
        downloads: where it saves what a page gives.
    """
    options = webdriver.ChromeOptions()
    assert _BROWSER is not None
    options.binary_location = _BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1366,900", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    try:
        driver.set_script_timeout(120)
        yield driver
    finally:
        driver.quit()


def found_in(driver: webdriver.Chrome, photo: bytes) -> dict[str, Any]:
    """What the open page finds in a photo, by its own modules: a mask, or a `problem`."""
    found: dict[str, Any] = driver.execute_async_script(_ASKED, base64.b64encode(photo).decode())
    return found


def mask_of(found: dict[str, Any]) -> NDArray[np.bool_]:
    """The mask in what `found_in` gave, bool [height, width]."""
    assert "problem" not in found, found
    width, height = found["size"]["width"], found["size"]["height"]
    bits = np.frombuffer(base64.b64decode(found["bits"]), np.uint8)
    return np.unpackbits(bits.reshape(height, -1), axis=1, count=width).astype(np.bool_)
