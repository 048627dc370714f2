"""What is wrong with the surroundings is said at the start, or does no harm."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.app import create_app
from server.inference import loading
from server.keys import KeyFile, KeyFileError, new_key
from server.settings import Settings
from tests.support import ROOT
from tests.support.app import backend_of, serve_app
from tests.support.launch import free_port, serve
from tests.support.offline import CPU_BACKEND
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("small_networks")


def refused(*flags: str, code: int = 2, **environment: str) -> str:
    """What the server says when it ends at the start."""
    result = subprocess.run(
        [sys.executable, "-m", "server", "--port", str(free_port()), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("left", ["", "\n", "# the keys of\n"])
def test_a_file_cut_off_before_its_first_key_leaves_the_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str
) -> None:
    file = tmp_path / "keys"
    key, line = new_key("clinic")
    file.write_text(line, encoding="utf-8")
    keys = KeyFile(file)
    file.write_text(left, encoding="utf-8")
    assert keys.find(key) and keys.find(key)
    assert [text for text in caplog.messages if "stay as they were" in text and "no key" in text]
    with pytest.raises(KeyFileError, match="no key"):
        KeyFile(file)


@pytest.mark.parametrize("kept", [3, 20, -1])
def test_a_file_cut_off_within_a_key_leaves_the_keys(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "keys"
    (one, first), (two, second) = new_key("one"), new_key("two")
    file.write_text(f"{first}\n{second}", encoding="utf-8")
    keys = KeyFile(file)
    file.write_text(f"{first}\n{second[:kept]}", encoding="utf-8")
    assert keys.find(one) and keys.find(two)


def test_an_empty_file_of_keys_is_an_error_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch()
    assert "no key" in refused("--api-keys-file", str(file), code=1)


@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_not_every_address(host: str) -> None:
    assert "SLSNET_HOST" in refused(SLSNET_HOST=host)


_NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation is float]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "Infinity", "1e300", "1e999"])
@pytest.mark.parametrize("name", _NUMBERS)
def test_no_number_is_infinite(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_no_timer_is_too_long_for_the_clock() -> None:
    with pytest.raises(ValueError, match="keep_alive_s"):
        Settings(keep_alive_s=10**30)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metrics_keyed": True}, "--metrics-keyed needs --api-keys-file"),
        ({"port": 8001, "grpc_port": 8001}, "--port and --grpc-port are both 8001"),
        ({"threads": 1025}, "threads"),
        ({"decode_threads": 10**6}, "decode_threads"),
        ({"workers": 10**6}, "workers"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**given)


@pytest.mark.parametrize(
    "origin", ["foo", "clinic.example", "https://", "https://a.example/", "https://A.example"]
)
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        Settings(cors_origins=f"https://a.example:8443, http://localhost,{origin}")


def test_origins_are_read_from_a_list() -> None:
    settings = Settings(cors_origins=" https://a.example:8443,, http://[::1]:3000, *,null")
    assert settings.origins == ["https://a.example:8443", "http://[::1]:3000", "*", "null"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_bytes_in_flight": 2**20}, "--max-bytes-in-flight .* --max-body-bytes"),
        ({"max_pixels": 2**30}, "--max-pixels-decoding .* --max-pixels "),
        ({"key_requests_per_s": 1}, "--key-requests-per-s limits nobody"),
        ({"key_streams": 1}, "--key-streams limits nobody"),
    ],
)
def test_settings_that_are_hardly_meant_are_doubted(given: dict[str, Any], words: str) -> None:
    (doubt,) = Settings(**given).doubts
    assert re.match(words, doubt)
    assert not Settings().doubts


def test_doubts_are_told_at_the_start() -> None:
    with serve("--max-bytes-in-flight", "9", "--max-body-bytes", "10") as server:
        assert "WARNING" in server.log()
        assert "--max-bytes-in-flight (9) is below --max-body-bytes (10)" in server.log()


def test_ports_that_clash_are_told_in_one_line() -> None:
    said = refused("--port", "8001", SLSNET_GRPC_PORT="8001")
    assert "--port and --grpc-port are both 8001" in said.splitlines()[-1]


def test_an_infinite_drain_is_an_error_that_names_the_variable() -> None:
    assert "SLSNET_DRAIN_TIMEOUT_S" in refused(SLSNET_DRAIN_TIMEOUT_S="inf")


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_a_folder_of_metrics_from_outside_is_left_alone(tmp_path: Path, variable: str) -> None:
    stale = tmp_path / "counter_1.db"
    stale.write_bytes(b"figures of a process that is gone")
    # It is read at import, so the server is not forked from one that has imported.
    with serve(environment={variable: str(tmp_path)}) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert "slsnet_ready 1.0" in httpx.get(f"{server.url}/metrics").text
    assert list(tmp_path.iterdir()) == [stale]


def _nowhere(*_: object) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_the_cpu_serves_and_tensorrt_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "expanduser", _nowhere)
    app, _ = create_app(Settings(backend="auto", threads=1))
    with serve_app(app) as client:
        until(lambda: backend_of(client) == CPU_BACKEND)
    failed = threading.Event()
    app, _ = create_app(Settings(backend="tensorrt"), failed.set)
    with serve_app(app):
        assert failed.wait(60)
    assert "--engine-dir" in caplog.text


def test_a_load_that_fails_in_an_unforeseen_way_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "open_backend", _nowhere)
    failed = threading.Event()
    app, _ = create_app(Settings(backend="onnxruntime"), failed.set)
    with serve_app(app):
        assert failed.wait(60)
