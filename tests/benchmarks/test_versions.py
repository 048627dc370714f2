"""The comparison of two versions of the server: both answer, and a row has their ratios."""

import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import versions
from benchmarks.versions import Load, compare
from photos.dicom.process import is_dicom
from photos.formats import foreign
from tests.support import ROOT
from tests.support.dicom import needs_dicom
from tests.support.launch import serve
from tests.support.lesions import drawn_photo
from tests.support.phones import needs

_STUB = ("-m", "benchmarks.peers.slsnet")


def has_history() -> bool:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_history(), reason="these files are no git clone")
def test_an_earlier_version_serves_beside_this_one(tmp_path: Path) -> None:
    versions.unpack("HEAD", tmp_path)
    stub = {"PEER_NETWORK": "stub:0"}
    photos = [drawn_photo(seed, 300, 200) for seed in range(4)]
    with (
        serve(command=_STUB, environment=stub, folder=tmp_path) as before,
        serve(command=_STUB, environment=stub) as now,
    ):
        row = compare(before, now, Load("small", photos * 5, 2), turns=2)
        folders = [Path(f"/proc/{one.process.pid}/cwd").resolve() for one in (before, now)]
    assert folders == [tmp_path.resolve(), ROOT.resolve()]
    name, clients, *figures = [cell.strip(" *") for cell in row.strip("|").split("|")]
    assert (name, clients, len(figures)) == ("small", "2", 9)
    assert all(float(figure) > 0 for figure in figures)


def test_photos_are_drawn_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Private: twenty of six megapixels take half a minute.
    monkeypatch.setattr(versions, "_PHOTOS", 2)
    monkeypatch.setattr(versions, "_LARGE", (900, 600))
    small, large, source = versions.load_photos(tmp_path / "none")
    assert source == "generated"
    for photos, size in ((small, (600, 450)), (large, (900, 600))):
        assert [Image.open(BytesIO(photo)).size for photo in photos] == [size] * 2
        assert photos[0] != photos[1]


@pytest.mark.parametrize("kind", ["dicom", "phones"])
def test_what_has_a_process_of_its_own_is_sent_and_asked_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "dicom":
        needs_dicom()
    else:
        needs("AVIF")
        needs("HEIC")
    monkeypatch.setattr(versions, "_PHOTOS", 2)
    monkeypatch.setattr(versions, "_LARGE", (90, 60))
    sent, _ = versions.loads(tmp_path / "none", **{kind: True})
    assert {load.clients for load in sent} == {1, 4}
    names = {foreign(photo) or is_dicom(photo) for load in sent for photo in load.photos}
    assert names == ({True} if kind == "dicom" else {"AVIF", "HEIC"})
    with serve(command=_STUB, environment={"PEER_NETWORK": "stub:0"}) as server:
        for load in sent:
            assert all(figure > 0 for figure in versions.send(server, load))


def test_a_revision_that_git_does_not_know_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["no-such-revision", "--images", "nowhere"])
    assert "no-such-revision" in capsys.readouterr().err
