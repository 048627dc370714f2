"""Headless Firefox, where this machine has it, by WebDriver BiDi: no other program is needed."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support.waiting import until

__all__ = ["Firefox", "firefox", "needs_firefox"]

_BROWSER = shutil.which("firefox-esr") or shutil.which("firefox")

needs_firefox = pytest.mark.skipif(
    _BROWSER is None, reason="needs Firefox (apt-get install firefox-esr)"
)

_PREFERENCES: dict[str, object] = {
    # A camera that draws colours, and nobody to ask whether the page may have it.
    "media.navigator.streams.fake": True,
    "media.navigator.permission.disabled": True,
    "browser.download.folderList": 2,
    "browser.download.always_ask_before_handling_new_types": False,
    # It asks nobody for anything at its start.
    "app.normandy.enabled": False,
    "app.update.enabled": False,
    "browser.safebrowsing.update.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
}


class Firefox:
    """A page in Firefox."""

    def __init__(self, socket: ClientConnection, downloads: Path) -> None:
        self.downloads = downloads
        self._socket = socket
        self._sent = 0
        self._ask("session.new", capabilities={})
        tree = self._ask("browsingContext.getTree")
        self._context: str = tree["contexts"][0]["context"]

    def open(self, url: str) -> None:
        self._ask("browsingContext.navigate", context=self._context, url=url, wait="complete")

    def run(self, body: str) -> Any:
        """What an asynchronous function with this body returns, which JSON can hold."""
        found = self._evaluate(f"(async () => {{ {body} }})().then((it) => JSON.stringify(it))")
        return json.loads(found["value"]) if found["type"] == "string" else None

    def until(self, expression: str) -> None:
        """Wait until this is true in the page."""
        until(lambda: self.run(f"return Boolean({expression})"))

    def text(self, name: str) -> str:
        return str(self.run(f"return document.getElementById('{name}').textContent"))

    def choose(self, name: str, *files: Path) -> None:
        """Files into the input of this id."""
        element = self._evaluate(f"document.getElementById('{name}')")
        self._ask(
            "input.setFiles",
            context=self._context,
            element={"sharedId": element["sharedId"]},
            files=[str(file) for file in files],
        )

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point of the window, and let go at the last."""
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)} for x, y in points]
        press, release = ({"type": f"pointer{way}", "button": 0} for way in ("Down", "Up"))
        actions = [moves[0], press, *moves[1:], release]
        mouse = {"type": "pointer", "id": "mouse", "actions": actions}
        self._ask("input.performActions", context=self._context, actions=[mouse])

    def _evaluate(self, expression: str) -> dict[str, Any]:
        answer = self._ask(
            "script.evaluate",
            expression=expression,
            target={"context": self._context},
            awaitPromise=True,
        )
        assert answer["type"] == "success", answer
        result: dict[str, Any] = answer["result"]
        return result

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(timeout=600))).get("id") != self._sent:
            pass
        assert answer["type"] == "success", answer
        result: dict[str, Any] = answer["result"]
        return result


@contextlib.contextmanager
def firefox(folder: Path, preferences: dict[str, object] | None = None) -> Iterator[Firefox]:
    """A browser with a profile of its own.

    Args:
        folder: for its profile, and what it saves.
        preferences: as in about:config, beside those that it needs here.
    """
    assert _BROWSER is not None
    profile, downloads = folder / "profile", folder / "downloads"
    profile.mkdir()
    downloads.mkdir()
    kept = {**_PREFERENCES, "browser.download.dir": str(downloads), **(preferences or {})}
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in kept.items()]
    (profile / "user.js").write_text("\n".join(lines), encoding="utf-8")
    command = [_BROWSER, "--headless", "--no-remote", "--profile", str(profile)]
    command += ["--width", "1440", "--height", "900", "--remote-debugging-port", "0", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            address = _address(profile, process)
            with connect(address, max_size=None, proxy=None, open_timeout=600) as socket:
                yield Firefox(socket, downloads)
        finally:
            process.terminate()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it listens, which it writes into its profile."""
    told = profile / "WebDriverBiDiServer.json"

    def is_told() -> bool:
        assert process.poll() is None, "Firefox ended at its start."
        return told.is_file() and told.read_text().endswith("}")

    until(is_told)
    found = json.loads(told.read_text())
    return f"ws://{found['ws_host']}:{found['ws_port']}/session"
