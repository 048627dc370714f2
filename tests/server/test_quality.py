"""Every mask says how good it is likely to be, by every way, and only if that is known."""

import base64
import contextlib
import email
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from photos.quality import QualityTable, grade
from photos.regions import largest_region
from server.backends import BackendError
from server.bulk.__main__ import main as bulk
from server.bulk.ledger import Ledger, Row
from server.bulk.sources import Listed
from server.command.segment import main as segment
from server.http.app import create_app
from server.settings import Settings
from tests.support import MODEL
from tests.support.answers import figures
from tests.support.app import serve_app
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.loading import load
from tests.support.results import table as table_of
from tests.support.waiting import until

TABLE = QualityTable.parse(MODEL.with_suffix(".quality.json").read_bytes())
PHOTO = drawn_photo(3, 200, 150)


def ask(server: ServerProcess, query: str = "", **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/segment?{query}", content=PHOTO, **options).raise_for_status()


@pytest.fixture(scope="module")
def probability(server: ServerProcess) -> NDArray[np.float32]:
    answer = ask(server, "mask=probabilities").json()
    levels = np.frombuffer(base64.b64decode(answer["mask"]["probabilities"]), "<u2")
    return levels.reshape(128, 128).astype(np.float32) / np.float32(65535)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("clean", [False, True])
def test_it_is_that_of_the_mask_that_was_asked_for(
    server: ServerProcess, probability: NDArray[np.float32], threshold: float, clean: bool
) -> None:
    shown = largest_region(probability, threshold) if clean else probability
    expected = TABLE.quality(probability, shown > threshold)
    query = f"threshold={threshold}&clean={clean}"
    for form in ("mask=polygons", "mask=rle&size=model"):
        quality = ask(server, f"{query}&{form}").json()["quality"]
        assert quality["jaccard"] == pytest.approx(expected, abs=2e-3)
        assert quality["grade"] == grade(quality["jaccard"])
    header = ask(server, query).headers["Mask-Quality"]
    assert header == f"{quality['jaccard']:.3f};grade={quality['grade']}"


def test_a_mask_at_a_level_that_nothing_reaches_is_poor(server: ServerProcess) -> None:
    assert ask(server, "threshold=1&format=json").json()["quality"] == {
        "jaccard": 0.0,
        "grade": "poor",
    }


def test_each_photo_of_a_batch_has_its_own(server: ServerProcess) -> None:
    alone = ask(server).headers["Mask-Quality"]
    files = [("a", ("a.jpg", PHOTO)), ("b", ("b.jpg", b"none")), ("c", ("c.jpg", PHOTO))]
    lines = httpx.post(f"{server.url}/segment/batch", files=files).raise_for_status().text
    found = {line["index"]: line for line in map(json.loads, lines.splitlines())}
    assert "result" not in found[1]
    for index in (0, 2):
        quality = found[index]["result"]["quality"]
        assert f"{quality['jaccard']:.3f};grade={quality['grade']}" == alone
    mixed = httpx.post(
        f"{server.url}/segment/batch", files=files, headers={"Accept": "multipart/mixed"}
    )
    message = email.message_from_bytes(
        f"Content-Type: {mixed.headers['content-type']}\r\n\r\n".encode() + mixed.content
    )
    parts = {
        part["Item-Index"]: part["Mask-Quality"] for part in message.walk() if part["Item-Index"]
    }
    assert parts == {"0": alone, "1": None, "2": alone}


def test_its_distribution_is_a_metric(server: ServerProcess) -> None:
    before = figures(server)
    value = ask(server, "format=json").json()["quality"]["jaccard"]
    after = figures(server)
    assert after["slsnet_mask_quality_count"] == before.get("slsnet_mask_quality_count", 0) + 1
    total = after["slsnet_mask_quality_sum"] - before.get("slsnet_mask_quality_sum", 0)
    assert total == pytest.approx(value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shipped network alone, without its table."""
    return Path(shutil.copy(MODEL, tmp_path / "alone.onnx"))


def test_without_a_table_masks_are_served_and_nothing_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app, _ = create_app(Settings(model=model, backend="onnxruntime", threads=1))
    with serve_app(app) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        answer = client.post("/segment?format=json", content=PHOTO).raise_for_status()
        assert answer.json()["quality"] is None
        assert "Mask-Quality" not in client.post("/segment", content=PHOTO).headers
        assert "slsnet_mask_quality_count 0.0" in client.get("/metrics").text
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    assert segment([str(tmp_path / "a.jpg"), "--model", str(model)]) == 0
    assert "quality" not in capsys.readouterr().out
    assert bulk(_bulk(tmp_path, model)) == 0
    assert table_of(tmp_path / "results")["a.jpg"]["quality"] == ""


def _bulk(folder: Path, model: Path) -> list[str]:
    (folder / "photos").mkdir()
    (folder / "photos/a.jpg").write_bytes(PHOTO)
    return [
        str(folder / "photos"),
        str(folder / "results"),
        "--model",
        str(model),
        "--threads",
        "1",
    ]


def test_the_table_of_other_weights_is_refused_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = model.with_suffix(".quality.json")
    values = {**json.loads(TABLE.document()), "weights_sha256": "f00d" * 16}
    beside.write_text(json.dumps(values))
    for said in (r"alone\.quality\.json belongs to the weights f00d", r"alone\.onnx has 3ac4428f"):
        with pytest.raises(BackendError, match=said):
            load(model)
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    with pytest.raises(SystemExit) as ended:
        segment([str(tmp_path / "a.jpg"), "--model", str(model)])
    assert ended.value.code == 1
    assert "belongs to the weights" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", TABLE.document()[:-200]])
def test_a_damaged_table_is_refused_by_name(model: Path, content: bytes) -> None:
    model.with_suffix(".quality.json").write_bytes(content)
    with pytest.raises(BackendError, match=r"does not load .*alone\.quality\.json"):
        load(model)


def test_an_archive_has_a_column_of_it(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ask(server).headers["Mask-Quality"].partition(";")[0]
    assert bulk(_bulk(tmp_path, MODEL)) == 0
    found = float(table_of(tmp_path / "results")["a.jpg"]["quality"])
    assert found == pytest.approx(float(expected), abs=2e-3)
    assert segment([str(tmp_path / "photos/a.jpg")]) == 0
    assert f"quality {found:.3f} ({grade(found)})" in capsys.readouterr().out


def test_results_of_a_version_without_it_are_gone_on_from(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.begin(threshold=0.5)
        ledger.list([Listed("a.jpg", 1, 1), Listed("b.jpg", 1, 1)])
        (tmp_path / "masks/a.png").write_bytes(b"")
        ledger.record([("a.jpg", Row("ok", width=3))])
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite")) as state:
        state.execute("ALTER TABLE photos DROP COLUMN quality")
    with Ledger(tmp_path) as ledger:
        assert [task.path for task in ledger.pending()] == ["b.jpg"]
        ledger.record([("b.jpg", Row("ok", quality=0.5))])
        ledger.write_table()
    rows = table_of(tmp_path)
    assert (rows["a.jpg"]["quality"], rows["b.jpg"]["quality"]) == ("", "0.5")
