r"""Methods in two steps: a detector finds the lesion, and an older method draws its border.

    python -m model.two_steps train --out runs/two-steps --epochs 3
    python -m model.two_steps score --out runs/two-steps --images DIR --masks DIR

`train` trains SSDLite and Mask R-CNN (`model.zoo.detectors`) on the photos that other networks get
too, one after another. A call goes on where the last one was killed. `score` measures, as
`model.evaluate` does, at the masks' size: GrabCut in SSDLite's box, Mask R-CNN's mask, and SLIC's
superpixels, each with the label that most of its pixels have in that mask. Photos are reduced to
`--side` for the second step.

Sources: Unver and Ayan 2019 (doi:10.3390/diagnostics9030072) give GrabCut a box that YOLO found.
Mishra and Daescu 2019, and Sivanesan et al. 2019, are entries of ISIC 2018 which SLSNet's paper
names without a description: R-CNN with superpixels, and Mask R-CNN.
Substituted: SSDLite stands for YOLO, whose licence is not free, and Mask R-CNN for R-CNN.
`model.zoo.ceilings` measures what the second steps reach with annotated boxes and labels.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.files import replacing
from common.program import Help
from common.progress import TELL_EVERY_S, say, tell
from model.augment import Augmenter
from model.checkpoint import alone
from model.commands import run_command
from model.config import load_config
from model.data import PixelSet, add_data_arguments, add_pair_arguments, find_pairs
from model.evaluate import Network, evaluate
from model.splits import prepare
from model.zoo.ceilings import SEGMENTS, Mask, Pixels, grabcut, superpixels

_NAMES = ("ssdlite", "mask-rcnn")
_RATE, _DECAY, _WARMUP, _CLIP = 5e-4, 1e-2, 0.05, 1.0
_SAVE_EVERY_S = 30.0


class Training:
    """The training of a detector: all follows from the settings and the number of the step.

    Args:
        path: the checkpoint. If it is there, training goes on from it.
        settings: `detector`, `size`, `epochs`, `batch`, `seed`, `augment` and `pretrained`.
        pixels: photos of any side that is a multiple of `size`, with their masks.

    Raises:
        ValueError: the checkpoint has other settings or cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any], pixels: PixelSet) -> None:
        self.path, self.settings, self.pixels = path, settings, pixels
        self.steps = settings["epochs"] * math.ceil(len(pixels.ids) / settings["batch"])
        torch.manual_seed(settings["seed"])
        self.detector = _new(settings)
        weights = [p for p in self.detector.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, _RATE, weight_decay=_DECAY)
        device = torch.device("cpu")
        self.augment = Augmenter(
            settings["augment"], settings["size"], pixels.images.shape[-1], device
        )
        self.step = 0
        if path.exists():
            state = _read(path)
            if state["settings"] != settings or state["steps"] != self.steps:
                raise ValueError(
                    f"{path} was trained with {state['settings']} for {state['steps']} steps, not"
                    f" {settings} for {self.steps}: name another --out"
                )
            self.detector.load_state_dict(state["detector"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "settings": self.settings,
            "steps": self.steps,
            "step": self.step,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.path) as path:
            torch.save(state, path)

    def take_step(self) -> float:
        """Take one step; return its loss.

        Raises:
            ValueError: the loss is not a number.
        """
        settings, step = self.settings, self.step
        epoch, place = divmod(step, self.steps // settings["epochs"])
        random = np.random.default_rng((settings["seed"], epoch))
        rows = random.permutation(len(self.pixels.ids))[place * settings["batch"] :]
        rows = rows[: settings["batch"]]
        seed = settings["seed"] * 1_000_003 + step
        images, masks = (
            torch.from_numpy(part[rows]) for part in (self.pixels.images, self.pixels.masks)
        )
        x, y = self.augment(images, masks, seed)
        torch.manual_seed(seed)  # detectors draw the places that they learn from
        terms = self.detector.train()(list(x), [target(mask) for mask in y > 0.5])
        loss: Tensor = sum(terms.values(), torch.zeros(()))
        if not loss.isfinite():
            raise ValueError(f"{self.path}: the loss is not a number at step {step}")
        rate = min(1, (step + 1) / (_WARMUP * self.steps))
        rate *= (1 + math.cos(math.pi * step / self.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = _RATE * rate
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.detector.parameters(), _CLIP)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def run(self) -> None:
        """Train to the end, with a checkpoint now and then."""
        first, began = self.step, time.monotonic()
        told, saved = -math.inf, began
        while self.step < self.steps:
            loss, now = self.take_step(), time.monotonic()
            if now - told > TELL_EVERY_S or self.step == self.steps:
                told = now
                left = (now - began) / (self.step - first) * (self.steps - self.step)
                name = self.settings["detector"]
                tell(f"{name} step {self.step}/{self.steps} loss={loss:.4f}", left)
            if now - saved > _SAVE_EVERY_S or self.step == self.steps:
                saved = now
                self.save()


def target(mask: Tensor) -> dict[str, Tensor]:
    """What a detector learns of a mask, bool [1, side, side]: its box, unless it is empty."""
    rows, columns = (torch.nonzero(mask[0].any(axis))[:, 0] for axis in (1, 0))
    if not len(rows):
        mask = mask[:0]
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
    return {
        "boxes": torch.tensor(box, dtype=torch.float32).view(-1, 4),
        "labels": torch.ones(len(mask), dtype=torch.int64),
        "masks": mask.to(torch.uint8),
    }


def _new(settings: dict[str, Any]) -> nn.Module:
    # Their libraries are not needed to read `--help`.
    from model.zoo.detectors import build_detector

    return build_detector(settings["detector"], settings["size"], pretrained=settings["pretrained"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not {"settings", "steps", "step", "detector", "optimizer"} <= set(state):
            raise ValueError("it lacks parts")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: train it first") from error
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return state


class Finder:
    """A trained detector, which finds a lesion in a photo.

    Args:
        path: the checkpoint of a finished training.

    Raises:
        ValueError: there is none, or it is not finished.
    """

    def __init__(self, path: Path) -> None:
        state = _read(path)
        self.settings: dict[str, Any] = state["settings"]
        if state["step"] < state["steps"]:
            raise ValueError(
                f"{path} is not finished ({state['step']} of {state['steps']} steps): train it on"
            )
        self.detector = _new({**self.settings, "pretrained": False}).eval()
        self.detector.load_state_dict(state["detector"])

    @torch.inference_mode()
    def _detect(self, pixels: Pixels) -> dict[str, Tensor]:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        side = self.settings["size"]
        small = F.interpolate(image, (side, side), mode="area")
        found: dict[str, Tensor] = self.detector([small[0]])[0]
        return found

    def box(self, pixels: Pixels) -> Mask:
        """The box of the likeliest lesion, filled: uint8 [side, side, 3] → bool [side, side]."""
        mask = np.zeros(pixels.shape[:2], bool)
        for corners in self._detect(pixels)["boxes"][:1] / self.settings["size"]:
            left, top, right, bottom = (round(c * len(pixels)) for c in corners.tolist())
            mask[top:bottom, left:right] = True
        return mask

    def probability(self, pixels: Pixels) -> NDArray[np.float32]:
        """How likely each pixel is lesion: uint8 [side, side, 3] → [side, side], 0 without one."""
        masks = self._detect(pixels)["masks"][:1]
        if not len(masks):
            return np.zeros(pixels.shape[:2], np.float32)
        large = F.interpolate(masks, pixels.shape[:2], mode="bilinear", align_corners=False)
        return np.asarray(large[0, 0].numpy(), np.float32)


def methods(finders: dict[str, Finder]) -> dict[str, Callable[[Pixels], NDArray[np.float32]]]:
    """The methods by name: from uint8 [side, side, 3] to how likely each pixel is lesion.

    Args:
        finders: by the name of the detector; methods of a detector that is not there are left out.
    """
    found: dict[str, Callable[[Pixels], NDArray[np.float32]]] = {}
    if boxes := finders.get("ssdlite"):
        found["SSDLite's box alone"] = lambda pixels: boxes.box(pixels).astype(np.float32)
        found["SSDLite's box, GrabCut"] = lambda pixels: grabcut(pixels, boxes.box(pixels)).astype(
            np.float32
        )
    if masks := finders.get("mask-rcnn"):
        found["Mask R-CNN"] = masks.probability
        for segments in SEGMENTS:
            found[f"Mask R-CNN, SLIC of {segments} segments"] = partial(_label, masks, segments)
    return found


def _label(masks: Finder, segments: int, pixels: Pixels) -> NDArray[np.float32]:
    """Give each superpixel the label that the found mask gives most of its pixels."""
    return superpixels(pixels, masks.probability(pixels) > 0.5, segments).astype(np.float32)


def _train(args: argparse.Namespace) -> str:
    asked = {"epochs": args.epochs, "batch_size": args.batch, "size": args.size, "seed": args.seed}
    config = load_config("quick", overrides=asked)
    pixels, _, origin = prepare(config, args.data, args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    with alone(args.out):
        for name in args.detectors:
            settings = {
                "detector": name,
                "size": args.size,
                "epochs": args.epochs,
                "batch": args.batch,
                "seed": args.seed,
                "augment": config.augment,
                "pretrained": True,
            }
            Training(args.out / f"{name}.pt", settings, pixels).run()
    return f"trained: {', '.join(args.detectors)}; epochs: {args.epochs}; {origin}"


def _score(args: argparse.Namespace) -> str:
    import cv2

    finders = {name: Finder(args.out / f"{name}.pt") for name in args.detectors}
    samples = find_pairs(args.images, args.masks)[: args.limit]
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    said = []
    for finder in finders.values():
        kept = ("detector", "epochs", "size", "seed", "augment")
        said.append(", ".join(f"{key} {finder.settings[key]}" for key in kept))
    said.append(f"{len(samples)} photos, second step at {args.side}×{args.side} pixels")
    said.append(f"{'':>32}  Jaccard          threshold Jaccard  ms a photo")
    for name, method in methods(finders).items():
        say(name)
        took: list[float] = []

        def predict(
            batch: NDArray[np.uint8],
            method: Callable[[Pixels], NDArray[np.float32]] = method,
            took: list[float] = took,
        ) -> NDArray[np.float32]:
            found = []
            for pixels in batch:
                began = time.thread_time()  # one thread does all, and others may be at work
                found.append(method(pixels))
                took.append(time.thread_time() - began)
            return np.stack(found)

        figures = evaluate(samples, Network(args.out, args.side, {}, predict)).report()
        said.append(
            f"{name:>32}  {figures['jaccard']:.4f} ± {figures['jaccard_standard_error']:.4f}"
            f"  {figures['threshold_jaccard']:.4f}             {1000 * statistics.median(took):.0f}"
        )
    return "\n".join(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.two_steps", description=__doc__, formatter_class=Help
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", formatter_class=Help, help="train the detectors")
    add_data_arguments(train)
    train.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    train.add_argument("--batch", type=int, default=8, help="photos in a step")
    train.add_argument("--size", type=int, default=128, help="side of the photos, pixels")
    train.add_argument("--seed", type=int, default=0, help="of all random numbers")
    train.set_defaults(run=_train)
    score = commands.add_parser("score", formatter_class=Help, help="score the methods")
    add_pair_arguments(score)
    score.add_argument("--limit", type=int, metavar="N", help="the first N photos (default: all)")
    score.add_argument(
        "--side", type=int, default=512, help="side of the photos in the second step, pixels"
    )
    score.set_defaults(run=_score)
    for command in (train, score):
        command.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoints"
        )
        command.add_argument(
            "--detectors",
            nargs="+",
            choices=_NAMES,
            default=_NAMES,
            metavar="NAME",
            help=f"of {', '.join(_NAMES)} (default: both)",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_command(_parser(), arguments, "requirements-zoo.txt")


if __name__ == "__main__":
    main()
