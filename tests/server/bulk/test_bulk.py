"""`python -m server.bulk`: a mask and a line for every photo, whatever happens on the way."""

import contextlib
import errno
import gc
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from common.progress import Progress
from common.stamp import unstamped
from photos.image import lesion_mask, read_photo, unpack_mask
from photos.masks import measure
from photos.regions import largest_region
from server.backends import Backend, BackendInfo, Images
from server.bulk import segmenter
from server.bulk.__main__ import main
from server.bulk.ledger import Ledger, Listing, Row, Task
from server.bulk.sources import BulkError, Listed, open_source
from server.settings import SHIPPED_MODEL
from tests.support import MODEL, ROOT
from tests.support.dicom import dicom_bytes, needs_dicom
from tests.support.launch import ServerProcess
from tests.support.lesions import drawn_photo
from tests.support.offline import CPU_BACKEND, Offline
from tests.support.results import masks, recorded, table
from tests.support.samples import Sample
from tests.support.waiting import until


@pytest.fixture(scope="module")
def small_photos() -> list[bytes]:
    """As photos come, but small."""
    formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
    return [drawn_photo(seed, 160 + seed, 120, formats[seed % 5]) for seed in range(10)]


@pytest.fixture
def folder(tmp_path: Path, small_photos: list[bytes]) -> Path:
    """Ten photos in folders below one."""
    folder = tmp_path / "folder"
    for index, photo in enumerate(small_photos):
        write(folder / f"{'abc'[index % 3]}/{index % 2}/photo {index}.JPG", photo)
    return folder


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    level = logging.getLogger("slsnet").level
    yield
    logging.getLogger("slsnet").setLevel(level)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def bulk(source: Path, results: Path, *flags: str) -> int:
    """With one thread: tests may have the machine in common with others."""
    return main([str(source), str(results), "--threads", "1", *flags])


def start(source: Path, results: Path) -> subprocess.Popen[bytes]:
    return _started("-m", "server.bulk", str(source), str(results))


# Stands still after so many photos, until there is a file of that name.
_HELD = """
import asyncio, sys
from pathlib import Path
from server.bulk.__main__ import main
from server.bulk.segmenter import PhotoSegmenter

most, go = int(sys.argv.pop(1)), Path(sys.argv.pop(1))
segment = PhotoSegmenter.segment
begun = 0

async def segment_held(self, task):
    global begun
    begun += 1
    while begun > most and not go.exists():
        await asyncio.sleep(0.01)
    return await segment(self, task)

PhotoSegmenter.segment = segment_held
sys.exit(main())
"""


def start_held(source: Path, results: Path, most: int, go: Path) -> subprocess.Popen[bytes]:
    """As `start`, but it is not done before a test that is slow has done what it wants to."""
    return _started("-c", _HELD, str(most), str(go), str(source), str(results))


def _started(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, *arguments, "--threads", "1"]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def test_a_mask_and_a_line_for_every_photo(
    folder: Path, tmp_path: Path, offline: Offline, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    write(folder / "notes.txt", b"not a photo")
    write(folder / ".hidden.jpg", b"not a photo")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    assert bulk(folder, results) == 0

    lines = table(results)
    photos = [path for path in folder.rglob("*.JPG") if path.is_file()]
    assert set(lines) == {str(path.relative_to(folder)) for path in photos}
    for path in photos:
        line = lines[str(path.relative_to(folder))]
        expected = offline.mask(path.read_bytes())
        assert line["mask"] == f"masks/{path.relative_to(folder).with_suffix('.png')}"
        with Image.open(results / line["mask"]) as mask:
            assert mask.mode == "1"
            found = np.asarray(mask)
        # The network's sums round otherwise in another batch.
        assert np.count_nonzero(found != expected) <= 2
        assert (line["status"], line["error"]) == ("ok", "")
        lesion = measure(np.packbits(found, axis=1), found.shape[1])
        box = lesion.bounding_box or ("",) * 4
        assert (int(line["height"]), int(line["width"])) == found.shape
        assert int(line["area"]) == lesion.area
        assert float(line["area_fraction"]) == pytest.approx(lesion.area / found.size, rel=1e-3)
        names = ("box_x", "box_y", "box_width", "box_height")
        assert tuple(line[name] for name in names) == tuple(map(str, box))
        if lesion.area:
            centroid = float(line["centroid_x"]), float(line["centroid_y"])
            assert centroid == pytest.approx(lesion.centroid, abs=0.01)
            assert 0.5 < float(line["mean_probability"]) <= float(line["max_probability"]) <= 1
        assert float(line["milliseconds"]) > 0
        assert (line["backend"], line["threshold"]) == (CPU_BACKEND, "0.5")
        assert len(line["weights_sha256"]) == 64
    assert set(masks(results)) == {line["mask"] for line in lines.values()}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    output = capfd.readouterr().err
    assert "10 of 10 photos (100%)" in output
    assert "1 other files are passed over (.txt)" in output
    assert "photo " not in output, "names are the table's alone"


def test_threshold_and_cleaning_are_those_of_the_service(
    tmp_path: Path, photos: list[Sample], offline: Offline, server: ServerProcess
) -> None:
    for sample in photos[:4]:
        write(tmp_path / f"folder/{sample.name}.jpg", sample.data)

    assert bulk(tmp_path / "folder", tmp_path / "results", "--threshold", "0.02", "--clean") == 0

    cleaned = 0
    for line in table(tmp_path / "results").values():
        photo = read_photo((tmp_path / "folder" / line["path"]).read_bytes())
        raw = offline.probability(photo)
        probability = largest_region(raw, 0.02)
        cleaned += not np.array_equal(raw, probability)
        expected = unpack_mask(
            lesion_mask(probability, photo.width, photo.height, 0.02), photo.width
        )
        with Image.open(tmp_path / "results" / line["mask"]) as mask:
            assert np.count_nonzero(np.asarray(mask) != expected) <= expected.size / 1e5
        assert (line["threshold"], line["clean"]) == ("0.02", "1")
        data = (tmp_path / "folder" / line["path"]).read_bytes()
        url = f"{server.url}/segment?format=json&threshold=0.02&clean=true"
        lesion = httpx.post(url, content=data).json()["lesion"]
        for name in ("area_fraction", "mean_probability", "max_probability"):
            assert float(line[name]) == pytest.approx(lesion[name], abs=2e-4), name
        centroid = float(line["centroid_x"]), float(line["centroid_y"])
        assert centroid == pytest.approx(lesion["centroid"], abs=0.1)
    assert cleaned


def test_dicom_lies_among_photos(tmp_path: Path) -> None:
    needs_dicom()
    pixels = np.asarray(Image.open(BytesIO(drawn_photo(3, 160, 120, "PNG"))))
    write(tmp_path / "folder/same.png", drawn_photo(3, 160, 120, "PNG"))
    write(tmp_path / "folder/IM0001.DCM", dicom_bytes(pixels))
    frames = dicom_bytes(np.stack([pixels] * 2), kind="1.2.840.10008.5.1.4.1.1.7.4")
    write(tmp_path / "folder/frames.dcm", frames)
    assert bulk(tmp_path / "folder", tmp_path / "results") == 1
    lines = table(tmp_path / "results")
    assert lines["IM0001.DCM"]["area"] == lines["same.png"]["area"]
    assert lines["frames.dcm"]["status"] == "unusable"
    assert "2 frames" in lines["frames.dcm"]["error"]


def test_a_frame_of_each_dicom_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs_dicom()
    folder = tmp_path / "folder"
    pixels = np.asarray(Image.open(BytesIO(drawn_photo(3, 160, 120, "PNG"))))
    frames = np.stack([np.full_like(pixels, 220), pixels])
    write(folder / "frames.dcm", dicom_bytes(frames, kind="1.2.840.10008.5.1.4.1.1.7.4"))
    assert bulk(folder, tmp_path / "second", "--frame", "2", "--also", "overlay-png") == 0
    write(folder / "same.png", drawn_photo(3, 160, 120, "PNG"))
    assert bulk(folder, tmp_path / "without", "--also", "overlay-png") == 1
    same = table(tmp_path / "without")["same.png"]
    assert table(tmp_path / "second")["frames.dcm"]["area"] == same["area"]
    drawn = (tmp_path / "second/also/frames_overlay.png").read_bytes()
    assert drawn == (tmp_path / "without/also/same_overlay.png").read_bytes()
    capfd.readouterr()
    # Another frame is another run, also of results that came before there were frames.
    assert bulk(folder, tmp_path / "without", "--also", "overlay-png", "--frame", "2") == 2
    assert "frame 0" in capfd.readouterr().err
    assert bulk(folder, tmp_path / "third", "--frame", "2") == 1
    assert "frame=2 is for DICOM" in table(tmp_path / "third")["same.png"]["error"]


def test_a_coco_data_set_of_all_photos(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    write(folder / "a/no photo.jpg", b"none")
    blank = BytesIO()
    Image.new("RGB", (90, 70), (230, 200, 190)).save(blank, "PNG")
    write(folder / "a/no lesion.png", blank.getvalue())
    assert bulk(folder, results, "--coco") == 1
    found = {line["path"]: line for line in table(results).values() if line["mask"]}
    data = json.loads((results / "coco.json").read_text())
    assert data["categories"] == [{"id": 1, "name": "lesion"}]
    images = {image["id"]: image for image in data["images"]}
    assert sorted(image["file_name"] for image in images.values()) == sorted(found)
    with_lesion = {path for path, line in found.items() if int(line["area"])}
    assert {images[one["image_id"]]["file_name"] for one in data["annotations"]} == with_lesion
    for annotation in data["annotations"]:
        line = found[images[annotation["image_id"]]["file_name"]]
        assert annotation["area"] == int(line["area"])
        assert annotation["quality"] == pytest.approx(float(line["quality"]))
    # The same command once more writes the same.
    assert bulk(folder, results, "--coco") == 1
    assert json.loads((results / "coco.json").read_text()) == data


# pycocotools is for NumPy 1.
@pytest.mark.usefixtures("small_networks")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_cocos_own_tools_read_the_masks(folder: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    results = tmp_path / "results"
    assert bulk(folder, results, "--coco", "--clean") == 0
    found = {line["path"]: line for line in table(results).values()}
    read = coco.COCO(str(results / "coco.json"))
    assert len(read.anns) == len(read.imgs) == len(found)
    for annotation in read.anns.values():
        line = found[read.imgs[annotation["image_id"]]["file_name"]]
        with Image.open(results / line["mask"]) as mask:
            expected = np.asarray(mask.convert("L")) > 127
        assert np.array_equal(read.annToMask(annotation).astype(bool), expected)


@pytest.mark.usefixtures("small_networks")
def test_other_forms_lie_beside_the_masks(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    also = ("--also", "overlay,probability16,npy,svg,coco,features")
    write(folder / "a/no photo.jpg", b"none")
    assert bulk(folder, results, *also) == 1
    found = {line["mask"]: line for line in table(results).values() if line["mask"]}
    names = {str(path.relative_to(results / "also")) for path in files(results / "also")}
    suffixes = ["overlay.jpg", "probability16.png", "probability.npy", "outline.svg"]
    suffixes += ["coco.json", "features.json"]
    stems = [mask.removeprefix("masks/").removesuffix(".png") for mask in found]
    assert names == {f"{stem}_{suffix}" for stem in stems for suffix in suffixes}
    for mask, line in found.items():
        stem = results / "also" / mask.removeprefix("masks/").removesuffix(".png")
        size = int(line["width"]), int(line["height"])
        with Image.open(f"{stem}_overlay.jpg") as drawn:
            assert drawn.size == size
        assert np.load(f"{stem}_probability.npy").shape == size[::-1]
        annotation = json.loads(Path(f"{stem}_coco.json").read_text())
        assert annotation["area"] == int(line["area"])

    # Those of a photo that is run again are written anew, those of one that is gone go with it.
    (first, *_) = sorted(folder.rglob("*.JPG"))
    first.write_bytes(drawn_photo(5, 90, 70))
    assert bulk(folder, results, *also) == 1
    changed = str(first.relative_to(folder).with_suffix(""))
    with Image.open(results / "also" / f"{changed}_overlay.jpg") as drawn:
        assert drawn.size == (90, 70)
    first.write_bytes(b"none any more")
    assert bulk(folder, results, *also) == 1
    assert not list((results / "also").glob(f"{changed}_*"))

    capfd.readouterr()
    assert bulk(folder, results) == 2
    assert "also" in capfd.readouterr().err


def test_a_form_that_does_not_exist_is_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bulk(folder, tmp_path / "results", "--also", "gif")
    assert "no form gif" in capfd.readouterr().err


@pytest.mark.usefixtures("small_networks")
def test_what_is_wrong_with_a_photo_is_in_its_line_and_stops_nothing(
    folder: Path, tmp_path: Path, small_photos: list[bytes]
) -> None:
    results = tmp_path / "results"
    write(folder / "cut.png", small_photos[1][: len(small_photos[1]) // 2])
    write(folder / "empty.jpg", b"")
    write(folder / "text.jpeg", b"a text that says it is a photo")
    write(folder / "wide.jpg", drawn_photo(1, 300, 200))
    write(folder / "heavy.bmp", small_photos[4] + bytes(90_000))
    (folder / "dangling.jpg").symlink_to(tmp_path / "nothing")
    flags = ("--max-pixels", "40000", "--max-body-bytes", "100000")

    assert bulk(folder, results, *flags) == 1

    lines = table(results)
    errors = {path: (line["status"], line["error"]) for path, line in lines.items()}
    wrong = {path: error for path, error in errors.items() if error != ("ok", "")}
    assert set(wrong) == {
        "cut.png", "empty.jpg", "text.jpeg", "wide.jpg", "heavy.bmp", "dangling.jpg",
    }  # fmt: skip
    assert wrong["empty.jpg"][1].startswith("The image is empty")
    assert wrong["text.jpeg"][1].startswith("The bytes are not an image")
    assert "60000 pixels" in wrong["wide.jpg"][1]
    assert "--max-body-bytes" in wrong["heavy.bmp"][1]
    assert wrong["dangling.jpg"] == ("failed", "there is no such file")
    assert {status for status, _ in wrong.values()} == {"unusable", "failed"}
    assert all(lines[path]["mask"] == "" for path in wrong)
    assert len(masks(results)) == 10

    written = masks(results)
    write(tmp_path / "nothing", small_photos[0])
    write(folder / "cut.png", small_photos[1])
    assert bulk(folder, results, *flags) == 1

    assert table(results)["dangling.jpg"]["status"] == "ok", "it is there now"
    assert table(results)["cut.png"]["status"] == "ok", "it was replaced by a whole one"
    assert len(masks(results)) == 12
    assert written.items() <= masks(results).items(), "those done are not run again"


@pytest.mark.usefixtures("small_networks")
def test_only_what_is_new_or_changed_is_run_again(
    folder: Path, tmp_path: Path, small_photos: list[bytes]
) -> None:
    results = tmp_path / "results"
    assert bulk(folder, results) == 0
    before = masks(results)

    write(folder / "new.jpg", small_photos[0])
    write(folder / "a/0/photo 0.JPG", small_photos[3])
    (results / "masks/b/1/photo 1.png").unlink()
    assert bulk(folder, results) == 0

    after = masks(results)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"masks/new.png", "masks/a/0/photo 0.png", "masks/b/1/photo 1.png"}
    assert len(table(results)) == 11
    assert table(results)["a/0/photo 0.JPG"]["width"] == "163"


@pytest.mark.usefixtures("small_networks")
def test_photos_that_are_gone_keep_a_mask_that_nobody_else_needs(
    folder: Path, tmp_path: Path, small_photos: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    write(folder / "a.jpg", small_photos[1])
    write(folder / "corrupt.jpg", b"no photo")
    assert bulk(folder, results) == 1
    before = masks(results)

    (folder / "a.jpg").rename(folder / "a.png")
    (folder / "corrupt.jpg").unlink()
    (folder / "b/1/photo 1.JPG").unlink()
    assert bulk(folder, results) == 0

    lines = table(results)
    assert len(lines) == 11
    assert {"a.png", "b/1/photo 1.JPG"} <= set(lines)
    assert not {"a.jpg", "corrupt.jpg"} & set(lines)
    after = masks(results)
    assert set(after) == {line["mask"] for line in lines.values()}
    assert after["masks/a.png"] != before["masks/a.png"], "it may be another photo"
    assert {name for name in after if after[name] != before[name]} == {"masks/a.png"}
    assert "2 photos that are no longer there" in capfd.readouterr().err

    write(folder / "a.jpg", small_photos[0])
    assert bulk(folder, results) == 2
    assert "masks/a.png" in capfd.readouterr().err
    assert masks(results) == after, "a refusal takes nothing"


@pytest.mark.usefixtures("small_networks")
def test_a_shorter_manifest_leaves_what_it_no_longer_names(
    tmp_path: Path, small_photos: list[bytes]
) -> None:
    results = tmp_path / "results"
    for index, name in enumerate(["1.jpg", "2.jpg", "2.png"]):
        write(tmp_path / name, small_photos[index])
    manifest = write(tmp_path / "list.txt", b"2.jpg\n1.jpg\n")
    assert bulk(manifest, results) == 0

    write(manifest, b"2.png\n")
    assert bulk(manifest, results) == 0

    assert set(table(results)) == {"1.jpg", "2.png"}, "2.jpg is a file, but not of this list"
    assert set(masks(results)) == {"masks/1.png", "masks/2.png"}

    before = masks(results)
    (tmp_path / "2.png").rename(tmp_path / "out of reach")
    assert bulk(manifest, results) == 0
    assert masks(results) == before


def test_masks_and_superpixels_beside_photos_are_no_photos(tmp_path: Path) -> None:
    photos, results = tmp_path / "photos", tmp_path / "results"
    belong = ["a_segmentation.png", "a_superpixels.png", "B_Segmentation.PNG", "D_superpixels.png"]
    # Without the photo, or with another name, nobody knows what they are.
    others = ["c_segmentation.png", "a_segmentation_2.png", "_segmentation.png"]
    others += ["a_segmentation.dcm", "a_segmentation.jpg"]
    taken = ["a.jpg", "B.JPG", "D.Jpg", "below/a_segmentation.png", *others]
    for name in belong + taken:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()
    source = open_source(photos, results)
    assert sorted(photo.path for photo in source.photos()) == sorted(taken)
    assert source.passed_over == {"_segmentation.png": 2, "_superpixels.png": 2}


@pytest.mark.usefixtures("small_networks")
def test_a_source_with_no_photos_takes_no_results(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    assert bulk(folder, results) == 0
    before = masks(results)
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()

    assert bulk(folder, results) == 2

    assert "has no photos" in capfd.readouterr().err
    assert masks(results) == before
    assert len(table(results)) == 10


def have_done(results: Path, *paths: str) -> None:
    """These are listed and done."""
    with Ledger(results) as ledger:
        ledger.list(Listed(path, 1, 1) for path in paths)
        for task in ledger.pending():
            write(results / "masks" / task.mask, b"a mask")
            ledger.record([(task.path, Row("ok", width=7))])
        ledger.write_table()


def test_a_listing_that_ends_half_way_drops_nothing(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg", "b.jpg", "c.jpg")

    def cut_short() -> Iterator[Listed]:
        yield Listed("b.png", 1, 1)
        yield Listed("a.jpg", 1, 1)
        raise BulkError("a folder cannot be read")

    with Ledger(tmp_path) as ledger:
        with pytest.raises(BulkError):
            ledger.list(cut_short())
        assert ledger.counts().done == 3
    assert set(masks(tmp_path)) == {"masks/a.png", "masks/b.png", "masks/c.png"}

    with Ledger(tmp_path) as ledger:
        again = [Listed("b.png", 1, 1), Listed("a.jpg", 1, 1), Listed("b.png", 1, 1)]
        assert ledger.list(again) == Listing(3, 1, 1)
        assert list(ledger.pending()) == [Task("b.png", "b.png")]
    assert set(masks(tmp_path)) == {"masks/a.png", "masks/c.png"}


def test_a_photo_that_wants_the_mask_of_one_still_there_takes_nothing(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg")
    for order in (["a.png", "a.jpg"], ["a.jpg", "a.png"]):
        with Ledger(tmp_path) as ledger:
            with pytest.raises(BulkError, match=r"would both have masks/a\.png"):
                ledger.list(Listed(path, 1, 1) for path in order)
            assert ledger.counts().done == 1
        assert set(masks(tmp_path)) == {"masks/a.png"}


def test_two_new_photos_with_the_mask_of_one_that_is_gone_are_refused(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg")
    with (
        Ledger(tmp_path) as ledger,
        pytest.raises(BulkError, match=r"a\.bmp and a\.png would both have masks/a\.png"),
    ):
        ledger.list([Listed("a.png", 1, 1), Listed("a.bmp", 1, 1)])


def test_results_of_the_version_before_are_gone_on_from(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg", "b.jpg")
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite")) as state:
        state.executescript(
            "ALTER TABLE photos DROP COLUMN seen; DROP TABLE waiting;"
            " DELETE FROM settings WHERE name = 'listing'; PRAGMA user_version = 1;"
        )

    with Ledger(tmp_path) as ledger:
        assert ledger.list([Listed("b.jpg", 1, 1)]) == Listing(1, 0, 0)
        assert not list(ledger.pending())
        assert ledger.counts().done == 2


def test_a_changed_photo_has_neither_figures_nor_mask_of_the_old_one(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg", "b.jpg")

    with Ledger(tmp_path) as ledger:
        ledger.list([Listed("a.jpg", 2, 2), Listed("b.jpg", 1, 1)])
        ledger.write_table()

    line = table(tmp_path)["a.jpg"]
    assert (line["status"], line["width"], line["mask"]) == ("pending", "", "")
    assert set(masks(tmp_path)) == {"masks/b.png"}


def test_names_that_no_file_can_have_are_listed_again(tmp_path: Path) -> None:
    paths = ["a\0.jpg", f"{'n' * 300}.jpg", "b.jpg", "b.png/c.jpg"]
    with Ledger(tmp_path) as ledger:
        ledger.list(Listed(path, None, None) for path in paths)
        write(ledger.masks / "b.png", b"a mask")
        ledger.record((path, Row("failed", "no file")) for path in paths)
    with Ledger(tmp_path) as ledger:
        ledger.list(Listed(path, None, None) for path in paths)
        assert len(list(ledger.pending())) == 4
        assert ledger.list([Listed("x.jpg", 1, 1)]).dropped == 4


def test_killed_before_there_is_a_database_it_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", die)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path / "results")

    have_done(tmp_path / "results", "a.jpg")


def test_what_a_killed_process_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    have_done(tmp_path, "a.jpg")
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite")) as state:
        state.execute("INSERT OR REPLACE INTO settings VALUES ('running', 1)")
        state.commit()
    left = [".table.csv.ab_12xyz.csv", "masks/.a.png.ab_12xyz.png"]
    others = [".table.csv.ab_12xyz.csv.old", ".table.csv.ABCDEFGH.csv", "table.csv.ab_12xyz.csv"]
    for name in left + others:
        write(tmp_path / name, b"half")

    with contextlib.suppress(BulkError), Ledger(tmp_path):
        raise BulkError("refused before it has begun")
    with Ledger(tmp_path) as ledger:
        ledger.begin()

    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in [*others, "table.csv", "masks/a.png"])


def test_killed_again_and_again_every_photo_is_in_the_table_once(
    tmp_path: Path, small_photos: list[bytes]
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    for index in range(40):
        write(folder / f"{index % 7}/{index}.jpg", small_photos[index % 10])
    moments = random.Random(0)
    done: dict[str, int] = {}
    kills = 0
    go = tmp_path / "go"
    while True:
        enough = len(done) + moments.randint(1, 12)
        with start_held(folder, results, 26, go) as process:
            while process.poll() is None:
                time.sleep(0.01 * moments.random())
                if kills < 2 and sum(1 for _ in results.rglob("*.png")) >= enough:
                    process.kill()
            assert process.stderr is not None
            errors = process.stderr.read().decode()
        assert process.returncode in (0, -signal.SIGKILL), errors
        written = masks(results)
        assert done.items() <= written.items(), "what was recorded as done is not run again"
        if process.returncode == 0:
            break
        kills += 1
        # The first time is enough to see that it goes on.
        go.touch()
        names = {f"masks/{path}".replace(".jpg", ".png") for path in recorded(results)}
        done = {name: written[name] for name in names}
    assert kills
    lines = table(results)
    assert len(lines) == 40
    assert {line["status"] for line in lines.values()} == {"ok"}
    assert set(masks(results)) == {line["mask"] for line in lines.values()}, "nothing half-made"


def test_a_signal_stops_it_between_photos_and_the_same_command_goes_on(
    tmp_path: Path, small_photos: list[bytes]
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results"
    for index in range(40):
        write(folder / f"{index}.jpg", small_photos[index % 10])
    go = tmp_path / "go"
    with start_held(folder, results, 10, go) as process:
        until(lambda: any(results.rglob("*.png")) or process.poll() is not None)
        process.terminate()
        go.touch()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in errors
    statuses = [line["status"] for line in table(results).values()]
    assert len(statuses) == 40
    assert 0 < statuses.count("ok") == len(masks(results)) < 40
    assert statuses.count("pending") == 40 - statuses.count("ok")

    assert bulk(folder, results) == 0

    assert {line["status"] for line in table(results).values()} == {"ok"}


@pytest.mark.usefixtures("small_networks")
def test_a_manifest_names_photos_wherever_they_are(
    tmp_path: Path, small_photos: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "lists/here.jpg", small_photos[0])
    write(tmp_path / "lists/sub/no-suffix", small_photos[1])
    away = write(tmp_path / "away/x.png", small_photos[2])
    entries = ["here.jpg", "./sub/../here.jpg", "sub/no-suffix", str(away), "missing.jpg"]
    manifest = write(tmp_path / "lists/photos.txt", "\n".join(entries).encode())

    assert bulk(manifest, tmp_path / "lists/results") == 1

    lines = table(tmp_path / "lists/results")
    assert {path: line["status"] for path, line in lines.items()} == {
        "here.jpg": "ok",
        "sub/no-suffix": "ok",
        str(away): "ok",
        "missing.jpg": "failed",
    }
    assert lines[str(away)]["mask"] == f"masks{away.with_suffix('.png')}"
    assert "1 paths were listed more than once" in capfd.readouterr().err

    rows = "id,path\n" + "\n".join(f'{i},"{entry}"' for i, entry in enumerate(entries))
    manifest = write(tmp_path / "lists/photos.csv", b"\xef\xbb\xbf" + rows.encode())
    assert bulk(manifest, tmp_path / "results") == 1
    assert set(table(tmp_path / "results")) == set(lines)


@pytest.mark.usefixtures("small_networks")
def test_names_of_any_kind_are_kept(tmp_path: Path, small_photos: list[bytes]) -> None:
    names = ['comma, "quote".jpg', "line\nfeed.jpg", "größe ×.jpg", os.fsdecode(b"latin-\xe9.jpg")]
    names += [f"{'n' * 240}.jpg", f"{'ö' * 120}.jpg"]
    for name in names:
        write(tmp_path / "folder" / name, small_photos[0])

    assert bulk(tmp_path / "folder", tmp_path / "results") == 0

    lines = table(tmp_path / "results")
    assert set(lines) == set(names)
    assert all((tmp_path / "results" / line["mask"]).is_file() for line in lines.values())


@pytest.mark.usefixtures("small_networks")
def test_two_photos_with_the_same_mask_are_refused(
    folder: Path, tmp_path: Path, small_photos: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    write(folder / "twin.jpg", small_photos[0])
    write(folder / "twin.png", small_photos[1])

    assert bulk(folder, tmp_path / "results") == 2

    error = capfd.readouterr().err
    assert "twin.jpg" in error
    assert "twin.png" in error
    assert "masks/twin.png" in error
    assert not masks(tmp_path / "results")


@pytest.mark.usefixtures("small_networks")
def test_what_cannot_be_done_says_what_to_change(
    folder: Path, tmp_path: Path, small_photos: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path, results: Path, *flags: str) -> str:
        assert bulk(source, results, *flags) == 2
        return capfd.readouterr().err

    results = tmp_path / "results"
    assert "there is no such file" in refused(tmp_path / "nowhere", results)
    (tmp_path / "empty").mkdir()
    assert "has no photos" in refused(tmp_path / "empty", tmp_path / "1")
    for photo in small_photos[:5]:
        assert "name its folder instead" in refused(write(tmp_path / "1.jpg", photo), results)
    assert "one in the other" in refused(folder, folder / "masks")
    assert "one in the other" in refused(folder, tmp_path)
    write(tmp_path / "thesis/chapter.txt", b"text")
    assert "holds files" in refused(folder, tmp_path / "thesis")
    columns = write(tmp_path / "list.csv", b"id,file\n1,a.jpg\n")
    assert "id, file" in refused(columns, tmp_path / "2")
    own = write(tmp_path / "own.txt", b"3/masks/a.jpg\n")
    write(tmp_path / "4.onnx", b"not a network")
    assert "cannot load" in refused(folder, tmp_path / "4", "--model", str(tmp_path / "4.onnx"))
    with pytest.raises(SystemExit):
        bulk(folder, results, "--threshold", "2")
    assert "0 to 1" in capfd.readouterr().err
    assert not results.exists()
    assert "where the results go" in refused(own, tmp_path / "3")

    assert bulk(folder, results) == 0
    assert "threshold 0.5" in refused(folder, results, "--threshold", "0.4")
    other = onnx.load(MODEL)
    for entry in other.metadata_props:
        if entry.key == "weights_sha256":
            entry.value = "0" * 64
    (tmp_path / "other.onnx").write_bytes(unstamped(other.SerializeToString()))
    assert "weights_sha256" in refused(folder, results, "--model", str(tmp_path / "other.onnx"))
    write(tmp_path / "b/1.jpg", small_photos[0])
    assert str(folder) in refused(tmp_path / "b", results)
    with Ledger(results):
        process = start(folder, results)
        _, error = process.communicate()
    assert process.returncode == 2
    assert b"Another process is at work" in error
    assert len(table(results)) == 10


class Failing:
    """A backend that works until it is needed."""

    def describe(self) -> BackendInfo:
        return BackendInfo("failing", "1", "cpu", "fp32", 4, model={"weights_sha256": "1" * 64})

    def warm_up(self) -> None: ...

    def infer(self, batch: Images) -> NDArray[np.float32]:
        if np.any(batch):
            raise RuntimeError("the GPU has fallen off the bus")
        return np.zeros((len(batch), 128, 128), np.float32)

    def close(self) -> None: ...


def test_a_network_that_fails_all_the_time_ends_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def open_failing(*_: Any, **__: Any) -> Backend:
        return Failing()

    monkeypatch.setattr("server.inference.loading.open_backend", open_failing)
    # A copy, beside which there is no table of another network's quality.
    network = shutil.copy(SHIPPED_MODEL, tmp_path / "network.onnx")
    flags = ("--backend", "onnxruntime", "--model", str(network))
    assert bulk(folder, tmp_path / "results", *flags) == 2
    assert "fails on every photo" in capfd.readouterr().err
    lines = table(tmp_path / "results")
    assert {line["status"] for line in lines.values()} <= {"pending", "failed"}


@pytest.mark.usefixtures("small_networks")
def test_a_full_disk_ends_the_run_and_is_gone_on_from(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    written = 0

    def fill_up(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(segmenter, "write_atomically", fill_up)
        assert bulk(folder, tmp_path / "results") == 2
    assert "No space left" in capfd.readouterr().err
    statuses = [line["status"] for line in table(tmp_path / "results").values()]
    assert sorted(set(statuses)) == ["ok", "pending"]

    assert bulk(folder, tmp_path / "results") == 0


def peak_bytes(results: Path, photos: int) -> int:
    """Most memory that listing, going through and writing so many takes."""
    many = (Listed(f"{index % 100}/{index}.jpg", 1, 1) for index in range(photos))
    with Ledger(results) as ledger:
        gc.collect()
        tracemalloc.start()
        assert ledger.list(many) == Listing(photos, 0, 0)
        tasks = ledger.pending()
        assert next(tasks) == Task("0/0.jpg", "0/0.png")
        assert sum(1 for _ in tasks) == photos - 1
        ledger.write_table()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(table(results)) == photos
    return peak


def test_a_list_of_any_length_is_gone_through_in_the_same_memory(tmp_path: Path) -> None:
    few, many = peak_bytes(tmp_path / "few", 3_000), peak_bytes(tmp_path / "many", 15_000)
    assert many < few + 500_000, "far less than as many paths take"


def test_neither_ray_nor_torch_is_loaded_unasked() -> None:
    code = (
        "import sys, server.__main__, server.process.worker, server.bulk.__main__;"
        "print({'ray', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert found.stdout.decode().strip() == "set()"


def test_progress_tells_pace_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    text = StringIO()
    progress = Progress(1000, 200, 5, text)
    for index in range(100):
        now += 0.25
        progress.add(successful=index != 50)
    progress.end()
    assert text.getvalue().splitlines() == [
        "240 of 1000 photos (24%), 5 without a mask, 4 photos/s, 3:10 left",
        "280 of 1000 photos (28%), 6 without a mask, 4 photos/s, 3:00 left",
        "300 of 1000 photos (30%), 6 without a mask, 4 photos/s, 2:55 left",
    ]
