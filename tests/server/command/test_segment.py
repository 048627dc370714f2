"""`slsnet segment`: the server's masks without a server, and no file lost."""

import json
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from server.command.segment import main
from tests.support.launch import ServerProcess
from tests.support.samples import Sample


def test_masks_are_those_of_the_server(
    tmp_path: Path,
    server: ServerProcess,
    photos: list[Sample],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = []
    for photo in photos[:3]:
        names.append(tmp_path / f"{photo.name}.jpg")
        names[-1].write_bytes(photo.data)
    assert main([*map(str, names), "--threshold", "0.4", "--clean"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("of the photo" in line for line in said)
    for photo in photos[:3]:
        mask = Image.open(tmp_path / f"{photo.name}_mask.png")
        answer = httpx.post(
            f"{server.url}/segment?threshold=0.4&clean=true", content=photo.data
        ).raise_for_status()
        served = Image.open(BytesIO(answer.content))
        assert mask.mode == "1" and mask.size == served.size
        assert (np.asarray(mask) == np.asarray(served)).all()


def test_the_overlay_is_the_upright_photo_with_the_outline(tmp_path: Path) -> None:
    # EXIF says that it lies on its side.
    with Image.open("docs/lesion.jpg") as upright:
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(
            tmp_path / "side.jpg", exif=exif, quality=95
        )
        pixels = np.asarray(upright, np.int16)
    assert main([str(tmp_path / "side.jpg"), "-o", str(tmp_path / "out"), "--also", "overlay"]) == 0
    shown = np.asarray(Image.open(tmp_path / "out/side_overlay.jpg"), np.int16)
    mask = np.asarray(Image.open(tmp_path / "out/side_mask.png"))
    assert shown.shape == pixels.shape and mask.shape == pixels.shape[:2]
    changed = np.abs(shown - pixels).max(axis=2) > 60
    # Drawn where the mask begins and ends, and nowhere else.
    rows, columns = np.nonzero(mask)
    near = np.zeros_like(mask)
    for down in range(-6, 7):
        for right in range(-6, 7):
            near |= np.roll(mask, (down, right), (0, 1)) != mask
    assert changed[near].any() and changed[~near].mean() < 0.001
    assert changed[rows.min() - 3 : rows.min() + 4, columns.min() : columns.max()].any()


def test_what_cannot_be_read_costs_its_own_mask_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.jpg").write_bytes(b"not an image")
    photos = [str(tmp_path / "no.jpg"), str(tmp_path / "absent.png"), "docs/lesion.jpg"]
    assert main([*photos, "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "no.jpg: The bytes are not an image" in said.err
    assert "absent.png: No such file or directory" in said.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lesion_mask.png"]


def test_no_file_is_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["-o", str(tmp_path)]
    (tmp_path / "lesion_mask.png").write_bytes(b"drawn by hand")
    with pytest.raises(SystemExit) as ended:
        main(["docs/lesion.jpg", *out])
    assert ended.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "lesion_mask.png").read_bytes() == b"drawn by hand"
    with pytest.raises(SystemExit):
        main(["docs/lesion.jpg", "elsewhere/lesion.png", "-o", str(tmp_path / "new")])
    assert "would both become" in capsys.readouterr().err
    assert main(["docs/lesion.jpg", *out, "--overwrite"]) == 0
    assert (tmp_path / "lesion_mask.png").read_bytes().startswith(b"\x89PNG")


def test_other_forms_are_those_of_the_server(tmp_path: Path, server: ServerProcess) -> None:
    also = "overlay,overlay-png,probability8,probability16,npy,svg,coco,features"
    assert main(["docs/lesion.jpg", "-o", str(tmp_path), "--also", also]) == 0
    written = {path.name.removeprefix("lesion_"): path.read_bytes() for path in tmp_path.iterdir()}
    photo = Path("docs/lesion.jpg").read_bytes()
    names = {
        "overlay.jpg": "overlay",
        "overlay.png": "overlay-png",
        "probability8.png": "probability8",
        "probability16.png": "probability16",
        "probability.npy": "npy",
        "outline.svg": "svg",
        "coco.json": "coco",
        "mask.png": "png",
    }
    for name, form in names.items():
        query = {"format": form, "size": "original"}
        answer = httpx.post(f"{server.url}/segment", content=photo, params=query)
        assert answer.raise_for_status().content == written.pop(name), name
    answer = httpx.post(f"{server.url}/segment/json", content=photo, params={"features": "true"})
    assert json.loads(written.pop("features.json")) == answer.json()["features"]
    assert not written


def test_an_unknown_form_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["docs/lesion.jpg", "-o", str(tmp_path), "--also", "svg,gif"])
    assert ended.value.code == 2 and "no form gif" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
