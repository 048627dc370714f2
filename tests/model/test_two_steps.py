"""Detectors learn, go on after a kill, and give the second step what they found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.lesions import lesion_photo
from tests.support.tiny import pixel_set, write_isic2017

pytest.importorskip("cv2", reason="needs requirements-zoo.txt")
pytest.importorskip("skimage", reason="needs requirements-zoo.txt")
pytest.importorskip("model.zoo.detectors", reason="needs requirements-zoo.txt")

from model.checkpoint import alone
from model.two_steps import Finder, Training, main, methods, target
from model.zoo.vision import torchvision

DETECTORS = ("ssdlite", "mask-rcnn")
SIDE = 64


def settings(name: str, **changes: Any) -> dict[str, Any]:
    common = {"size": SIDE, "epochs": 2, "batch": 4, "seed": 0, "augment": "strong"}
    return {"detector": name, **common, "pretrained": False, **changes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints of both detectors, and the losses of their steps."""
    out, losses = tmp_path_factory.mktemp("detectors"), {}
    pixels = pixel_set(4, SIDE)
    pixels.masks[0] = 0  # as where augmentation moves a lesion out of the frame
    for name in DETECTORS:
        training = Training(out / f"{name}.pt", settings(name), pixels)
        losses[name] = [training.take_step()]
        training.save()
        (out / f"{name}.half").write_bytes((out / f"{name}.pt").read_bytes())
        losses[name].append(training.take_step())
        training.save()
    return out, losses


@pytest.fixture(scope="module")
def finders(trained: tuple[Path, dict[str, list[float]]]) -> dict[str, Finder]:
    return {name: Finder(trained[0] / f"{name}.pt") for name in DETECTORS}


# torchvision's operators, its own or those of model.zoo.vision


def test_of_boxes_that_overlap_the_likeliest_is_kept() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.1])
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert torchvision.ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_a_crop_has_the_means_of_its_bins() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    maps = torch.cat([ramp, 10 * ramp]).requires_grad_()
    boxes = torch.tensor([[1.0, 8, 0, 24, 16], [0, 4, 4, 12, 12], [1, 0, 0, 8, 8]])
    found = torchvision.ops.roi_align(maps, boxes, (1, 2), 0.5, 2)
    expected = [[60, 100], [3, 5], [10, 30]]
    np.testing.assert_allclose(found.detach()[:, 0, 0], expected, rtol=1e-5)
    found.sum().backward()
    assert maps.grad is not None and float(maps.grad.sum()) == pytest.approx(6)


# Training


def test_a_mask_is_learnt_with_its_box_and_an_empty_one_without() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert target(mask)["boxes"].shape == (0, 4) and not len(target(mask)["labels"])
    mask[0, 2:5, 1:7] = True
    assert target(mask)["boxes"].tolist() == [[1, 2, 7, 5]]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_killed_training_takes_the_steps_that_it_would_have_taken(
    name: str, trained: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    out, losses = trained
    checkpoint = tmp_path / f"{name}.pt"
    checkpoint.write_bytes((out / f"{name}.half").read_bytes())
    pixels = pixel_set(4, SIDE)
    pixels.masks[0] = 0
    resumed = Training(checkpoint, settings(name), pixels)
    resumed.run()
    whole = torch.load(out / f"{name}.pt", weights_only=True)
    assert resumed.step == whole["step"] == 2
    for key, value in resumed.detector.state_dict().items():
        torch.testing.assert_close(value, whole["detector"][key])
    assert losses[name][0] != losses[name][1]
    with pytest.raises(ValueError, match=r"name another --out"):
        Training(checkpoint, settings(name, epochs=3), pixels)


def test_an_unfinished_training_is_not_scored(
    trained: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    path = tmp_path / "ssdlite.pt"
    path.write_bytes((trained[0] / "ssdlite.half").read_bytes())
    with pytest.raises(ValueError, match=r"is not finished \(1 of 2 steps\)"):
        Finder(path)


# The second step


def found(
    finders: dict[str, Finder], monkeypatch: pytest.MonkeyPatch, **answer: torch.Tensor
) -> Any:
    """The methods with detectors that see `answer` in every photo."""
    for finder in finders.values():
        monkeypatch.setattr(finder.detector, "forward", lambda _: [answer])
    return methods(finders)


def test_a_box_that_was_found_is_cut(
    finders: dict[str, Finder], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = lesion_photo(1, 96, 96)
    rows, columns = np.flatnonzero(photo.mask.any(1)), np.flatnonzero(photo.mask.any(0))
    box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]) * SIDE / 96
    those = found(finders, monkeypatch, boxes=box)
    filled = those["SSDLite's box alone"](photo.pixels) > 0.5
    assert filled.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    cut = those["SSDLite's box, GrabCut"](photo.pixels) > 0.5
    assert overlap(cut, photo.mask) > overlap(filled, photo.mask)


def test_superpixels_take_the_label_that_the_detector_gives_most_of_them(
    finders: dict[str, Finder], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = lesion_photo(2, 96, 96)
    coarse = np.zeros((SIDE, SIDE), np.float32)
    coarse[:, : SIDE // 2] = 0.9
    those = found(finders, monkeypatch, masks=torch.from_numpy(coarse)[None, None])
    plain = those["Mask R-CNN"](photo.pixels) > 0.5
    assert plain[:, :48].all() and not plain[:, 48:].any()
    drawn = those["Mask R-CNN, SLIC of 300 segments"](photo.pixels) > 0.5
    assert overlap(drawn, plain) > 0.8 and (drawn != plain).any()


def test_where_nothing_is_found_nothing_is_lesion(
    finders: dict[str, Finder], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, SIDE, SIDE)}
    pixels = lesion_photo(1, 32, 32).pixels
    for method in found(finders, monkeypatch, **nothing).values():
        assert not method(pixels).any()


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


# The command


def test_the_commands_train_and_score(
    trained: tuple[Path, dict[str, list[float]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_isic2017(tmp_path / "data", training=2, validation=2)
    flags = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["train", *flags, "--epochs", "0"])
    assert "epochs must be at least 1, not 0" in capsys.readouterr().err
    with alone(tmp_path), pytest.raises(SystemExit):
        main(["train", *flags, "--detectors", "ssdlite"])
    assert f"another process trains in {tmp_path}" in capsys.readouterr().err
    main(["train", *flags, "--epochs", "1", "--size", str(SIDE), "--detectors", "ssdlite"])
    assert "trained: ssdlite; epochs: 1; 2 images of isic2017" in capsys.readouterr().out
    pairs = ["--images", str(data / "ISIC-2017_Validation_Data")]
    pairs += ["--masks", str(data / "ISIC-2017_Validation_Part1_GroundTruth")]
    with pytest.raises(SystemExit):
        main(["score", *pairs, "--out", str(tmp_path)])
    assert f"{tmp_path / 'mask-rcnn.pt'} does not exist: train" in capsys.readouterr().err
    main(["score", *pairs, "--out", str(trained[0]), "--side", "64"])
    said = capsys.readouterr().out
    assert "detector mask-rcnn, epochs 2" in said and "2 photos" in said
    for name in ("SSDLite's box, GrabCut", "Mask R-CNN", "Mask R-CNN, SLIC of 1000 segments"):
        assert f"{name}  " in said
    (tmp_path / "mask-rcnn.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit):
        main(["score", *pairs, "--out", str(tmp_path)])
    assert "mask-rcnn.pt is not a readable checkpoint" in capsys.readouterr().err
