"""The process: what it loads, what it can be told, what it leaves on the disk."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import ExifTags, Image

from server.settings import Settings, read_settings, settings_table
from tests.support import ROOT
from tests.support.launch import free_port, serve
from tests.support.samples import Sample
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_nothing_that_is_imported_starts_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    imported = "import os, server.process.worker"
    result = python("-c", f"{imported}; print(len(os.listdir('/proc/self/task')))")
    assert result.stdout == "1\n", result.stderr


def test_serving_loads_neither_torch_nor_onnx() -> None:
    program = """
import json, sys
from pathlib import Path
import numpy as np
from server.http.app import create_app
from server.backends import open_backend
from server.settings import Settings
create_app(Settings())
backend = open_backend("auto", Settings().model, threads=1)
backend.warm_up()
backend.infer(np.zeros((3, 128, 128, 3), np.uint8))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout))
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "matplotlib", "tensorrt", "onnxscript"}


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_as_the_port_opens_is_heard(workers: int) -> None:
    program = """
import os, signal, socket, sys
from server import __main__ as entry
usual = entry._listen
def listen(*address):
    listener = usual(*address)
    global client
    client = socket.create_connection(listener.getsockname())
    os.kill(os.getpid(), signal.SIGTERM)
    return listener
entry._listen = listen
code = entry.main()
client.settimeout(60)
print("closed" if client.recv(1) == b"" else "?")
sys.exit(code)
"""
    flags = ("--port", f"{free_port()}", "--workers", f"{workers}", "--share-network", "no")
    result = python("-c", program, *flags, "--drain-grace-s", "0")
    assert result.returncode == 0, result.stderr
    # And the connection that was made by then is closed, not reset.
    assert result.stdout == "closed\n"


def test_help_lists_every_setting_with_its_variable() -> None:
    result = python("-m", "server", "--help")
    assert result.returncode == 0
    shown = " ".join(result.stdout.split())
    for flag, variable, default, description in settings_table():
        assert f"{flag} VALUE" in shown
        # argparse breaks lines at hyphens too.
        assert variable in shown
        assert description.replace("-", "") in shown.replace("- ", "").replace("-", "")
        assert default in shown


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLSNET_PORT", "9001")
    monkeypatch.setenv("SLSNET_MAX_QUEUE", "7")
    settings = read_settings(["--port", "9002"])
    assert (settings.port, settings.max_queue) == (9002, 7)
    assert read_settings([]).port == 9001
    assert Settings().drain_timeout_s == 60


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], ["--port", "SLSNET_PORT", "65535", "99999"]),
        (["--backend", "abacus"], ["--backend", "onnxruntime"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_a_wrong_setting_is_told(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_settings(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


@pytest.mark.parametrize("content", [None, b"not a network"])
def test_a_network_that_cannot_be_loaded_ends_the_process(
    tmp_path: Path, content: bytes | None
) -> None:
    model = tmp_path / "model.onnx"
    if content is not None:
        model.write_bytes(content)
    result = python("-m", "server", "--port", str(free_port()), "--model", str(model))
    assert result.returncode == 1
    (failure,) = (line for line in result.stderr.splitlines() if "ERROR" in line)
    assert str(model) in failure
    assert "Traceback" not in result.stderr
    assert ("listening on" in result.stderr) is (content is not None)


def test_a_hangup_while_it_starts_does_not_end_it() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "server", "--port", str(port), "--drain-grace-s", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        assert any("listening on" in line for line in lines)
        process.send_signal(signal.SIGHUP)
        assert any(" ready: " in line for line in lines)
        process.terminate()
        assert process.wait(60) == 0


def test_an_address_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = python("-m", "server", "--port", str(port))
    assert result.returncode == 1
    (failure,) = (line for line in result.stderr.splitlines() if "ERROR" in line)
    assert f"cannot listen on 127.0.0.1 port {port}" in failure
    assert "in use" in failure


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, "--host 127.0.0.1 --port 8000"),
        ([], {"HOST": "x86_64-conda-linux-gnu", "PORT": "1"}, "--host 127.0.0.1 --port 8000"),
        ([], {"SLSNET_HOST": "0.0.0.0", "SLSNET_PORT": "9001"}, "--host 0.0.0.0 --port 9001"),
        (["HOST=::1", "PORT=9002"], {"SLSNET_PORT": "9001"}, "--host ::1 --port 9002"),
    ],
)
def test_make_serve_listens_where_it_is_told(
    arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    result = subprocess.run(
        ["make", "--dry-run", "serve", "PYTHON=python3", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"-m server {expected}\n" in result.stdout


def test_uploads_never_touch_the_disk(photos: list[Sample]) -> None:
    # Every file that Python opens, and every temporary one, is reported by its audit events. A
    # number is a file that is open already: the log's.
    program = """
import runpy, sys
def watch(event, arguments):
    if event == "open" and not isinstance(arguments[0], int):
        if isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            print("WRITES", arguments[0], flush=True)
    if event.startswith("tempfile."):
        print("WRITES", arguments[0], flush=True)
sys.addaudithook(watch)
sys.argv[0] = "server"
runpy.run_module("server", run_name="__main__", alter_sys=True)
"""
    with (
        serve(command=["-c", program]) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        # Larger than any in-memory limit of the usual form parsers.
        padded = photos[0].data + bytes(4 * 2**20)
        assert client.post("/segment", files={"file": padded}).status_code == 200
        assert client.post("/segment", content=padded).status_code == 200
        assert client.post("/segment", files={"file": padded[:1000]}).status_code == 422
        tiff = BytesIO()
        Image.open(BytesIO(photos[0].data)).save(tiff, "TIFF", compression="tiff_lzw")
        assert client.post("/segment", content=tiff.getvalue()).status_code == 200
        many = [("file", padded), ("file", tiff.getvalue())]
        lines = client.post("/segment/batch", files=many).text.splitlines()
        assert [json.loads(line)["status"] for line in lines] == [200, 200]
        image = {"name": "image", "shape": [1, 128, 128, 3], "datatype": "UINT8"}
        tensor = gzip.compress(json.dumps({"inputs": [image | {"data": [0] * 49152}]}).encode())
        answer = client.post(
            "/v2/models/slsnet/infer", content=tensor, headers={"Content-Encoding": "gzip"}
        )
        assert answer.status_code == 200
        # Another thread writes it, and this is its last line.
        until(lambda: "/infer 200" in server.log())
        log = server.log()
    assert "POST /segment 200" in log
    assert "WRITES" not in log


def test_log_has_nothing_of_the_photo(photos: list[Sample]) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.ImageDescription] = "Jane-Doe"
    with (
        serve("--log-level", "debug") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for image_format in ("JPEG", "TIFF", "PNG", "WEBP"):
            buffer = BytesIO()
            Image.open(BytesIO(photos[0].data)).save(buffer, image_format, exif=tags)
            assert b"Jane-Doe" in buffer.getvalue()
            files = {"file": ("Jane-Doe.jpg", buffer.getvalue(), "image/jpeg")}
            assert client.post("/segment", files=files).status_code == 200
        many = [("Jane-Doe", files["file"])]
        assert client.post("/segment/batch", files=many).status_code == 200
        assert client.post("/segment?threshold=Jane-Doe", files=files).status_code == 422
        assert client.post("/Jane-Doe", files=files).status_code == 404
        # Another thread writes it, and this is its last line.
        until(lambda: " 404 " in server.log())
        log = server.log()
    assert log.count("POST /segment 200") == 4
    assert "Jane-Doe" not in log
