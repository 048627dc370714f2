"""Camera mode, with Chromium's own camera that plays a generated video."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.keys import new_key
from tests.support.launch import ServerProcess, serve
from tests.support.lesions import lesion_photo
from tests.support.page import NEEDS_BROWSER, Page, browse

pytestmark = NEEDS_BROWSER

WIDTH, HEIGHT = 320, 240


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lesion that moves to and fro, as YUV4MPEG2: frames without compression."""
    path = tmp_path_factory.mktemp("video") / "lesion.y4m"
    scene = Image.fromarray(lesion_photo(7, WIDTH + 40, HEIGHT).pixels)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{WIDTH} H{HEIGHT} F20:1 Ip A1:1 C420\n".encode())
        for left in (*range(0, 40, 2), *range(40, 0, -2)):
            frame = scene.crop((left, 0, left + WIDTH, HEIGHT)).convert("YCbCr")
            light, *colours = np.moveaxis(np.asarray(frame), 2, 0)
            file.write(b"FRAME\n" + light.tobytes())
            for colour in colours:
                file.write(colour[::2, ::2].tobytes())
    return path


def camera(video: Path) -> list[str]:
    return [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={video}",
    ]


@pytest.fixture(scope="module")
def page(
    server: ServerProcess, video: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    with browse(server.url, tmp_path_factory.mktemp("downloads"), *camera(video)) as page:
        yield page


def rate(page: Page) -> float:
    text = page.text("live-rate")
    return float(text) if text[:1].isdigit() else 0.0


def start(page: Page) -> None:
    page.open()
    page.find("live-camera").click()
    page.until(lambda: rate(page) > 0)


def middle(page: Page, name: str) -> float:
    """Where the middle of an outline is, as a share of the frame's width."""
    return float(
        page.run(
            """
            const path = document.getElementById(arguments[0]);
            const {x, width} = path.getBBox();
            return (x + width / 2) / path.ownerSVGElement.viewBox.baseVal.width;
            """,
            name,
        )
    )


def test_the_outline_follows_the_camera_and_a_frame_is_kept(page: Page) -> None:
    start(page)
    places: list[float] = []

    def moved() -> bool:
        places.append(middle(page, "live-contour"))
        return max(places) - min(places) > 0.05

    page.until(moved)
    assert int(page.text("live-latency")) >= 0
    assert 0 < float(page.text("live-share")) < 100
    assert page.text("live-size") == f"{WIDTH} × {HEIGHT}"
    assert not page.find("live-unfit").is_displayed()
    page.find("live-smooth").click()
    places.clear()
    page.until(moved)

    page.find("live-freeze").click()
    page.until_done()
    assert not page.find("live").is_displayed()
    assert page.text("dimensions") == f"{WIDTH} × {HEIGHT} px"
    assert float(page.text("percent")) > 0
    # The camera is off.
    assert page.run("return document.getElementById('video').srcObject === null")
    page.find("save-photo").click()
    page.until(lambda: any(page.downloads.glob("camera*.jpg")))
    page.find("live-again").click()
    page.until(lambda: rate(page) > 0)
    page.find("live-stop").click()
    assert page.find("result").is_displayed() and not page.find("live").is_displayed()


def test_a_video_file_and_one_that_does_not_play(page: Page, tmp_path: Path) -> None:
    start(page)
    page.find("live-stop").click()
    # Recorded by the browser itself, from a picture that turns.
    page.driver.execute_async_script(
        """
        const [done] = arguments;
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [160, 120];
        const pen = canvas.getContext("2d");
        const recorder = new MediaRecorder(canvas.captureStream(), {mimeType: "video/webm"});
        let turn = 0;
        const timer = setInterval(() => {
          pen.fillStyle = "#d9a38a";
          pen.fillRect(0, 0, 160, 120);
          pen.fillStyle = "#5a3020";
          pen.beginPath();
          pen.ellipse(80, 60, 35, 25, turn++ / 5, 0, 7);
          pen.fill();
          if (turn === 40) recorder.stop();
        }, 20);
        recorder.ondataavailable = ({data}) => {
          clearInterval(timer);
          const chosen = new DataTransfer();
          chosen.items.add(new File([data], "lesion.webm", {type: "video/webm"}));
          const input = document.getElementById("live-video");
          input.files = chosen.files;
          input.dispatchEvent(new Event("change"));
          done();
        };
        recorder.start();
        """
    )
    page.until(lambda: rate(page) > 0)
    assert page.text("live-size") == "160 × 120"
    assert page.find("live-low").is_displayed()
    page.find("live-stop").click()

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    page.find("live-video").send_keys(str(broken))
    page.until(page.find("note").is_displayed)
    assert "does not play this video" in page.text("note")
    assert not page.find("live").is_displayed() and page.find("live-camera").is_displayed()


def test_a_shared_screen_that_ends_gets_a_word(page: Page) -> None:
    page.open()
    # What the browser would ask for: a picture of the page's own stands for the window.
    page.run(
        """
        const canvas = document.createElement("canvas");
        const pen = canvas.getContext("2d");
        window.drawing = setInterval(() => pen.fillRect(0, 0, Math.random() * 99, 99), 20);
        const shared = canvas.captureStream();
        navigator.mediaDevices.getDisplayMedia = async () => shared;
        window.sharedTrack = shared.getVideoTracks()[0];
        """
    )
    page.find("live-screen").click()
    page.until(lambda: rate(page) > 0)
    # Black and white squares.
    page.until(page.find("live-unfit").is_displayed)
    page.run("window.sharedTrack.dispatchEvent(new Event('ended'))")
    assert page.text("note") == "Sharing has ended."
    assert not page.find("live").is_displayed()
    page.run(
        """
        navigator.mediaDevices.getDisplayMedia = async () => {
          throw new DOMException("no", "NotAllowedError");
        };
        """
    )
    page.find("live-screen").click()
    page.until(lambda: page.text("note") == "Nothing was shared.")


def test_a_camera_that_is_refused_or_missing_gets_a_word(
    server: ServerProcess, tmp_path: Path
) -> None:
    refused: dict[str, object] = {"profile.default_content_setting_values.media_stream_camera": 2}
    fake = "--use-fake-device-for-media-stream"
    for arguments, settings, word in (
        ([fake], refused, "The camera was not allowed."),
        (["--use-fake-ui-for-media-stream"], None, "There is no camera"),
    ):
        with browse(server.url, tmp_path, *arguments, settings=settings) as page:
            page.open()
            page.find("live-camera").click()
            page.until(page.find("note").is_displayed)
            assert page.text("note").startswith(word)
            assert not page.find("live").is_displayed()
            assert page.find("choose").is_enabled()


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_a_server_that_comes_back_goes_on(video: Path, tmp_path: Path) -> None:
    with serve() as own, browse(own.url, tmp_path, *camera(video)) as page:
        start(page)
        own.process.kill()
        own.wait()
        page.until(lambda: "trying again" in page.text("live-word"))
        page.until(lambda: rate(page) == 0)
        own.kill_and_start_again()
        page.until(lambda: rate(page) > 0)
        assert not page.text("live-word")


@pytest.mark.usefixtures("small_networks")
def test_a_browser_that_was_given_the_key_may_do_everything(video: Path, tmp_path: Path) -> None:
    key, line = new_key("clinic")
    keys = tmp_path / "keys"
    keys.write_text(f"{line}\n", encoding="utf-8")
    with (
        serve("--api-keys-file", str(keys)) as own,
        browse(own.url, tmp_path, *camera(video)) as page,
    ):
        # As typed into the browser's own question.
        page.driver.get(f"{own.url}/".replace("://", f"://anyone:{key}@"))
        start(page)
        page.find("live-freeze").click()
        page.until_done()
        assert float(page.text("percent")) > 0
