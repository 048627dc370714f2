"""A network, data sets and runs small enough to train in a test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.config import DiscriminatorConfig, GeneratorConfig, TrainConfig
from model.data import PixelSet
from tests.support.lesions import encode_photo, lesion_photo

GENERATOR: dict[str, Any] = {
    "widths": (4, 6, 8, 10),
    "encoder_blocks": 1,
    "dilations": (2,),
    "decoder_blocks": 1,
    "encoder_dropout": (0.0, 0.0),
}
SIMPLER: dict[str, Any] = {**GENERATOR, "multiscale": False, "cam": False}
"""One that is traced for ONNX in half the time."""

SETTINGS: dict[str, Any] = {
    "size": 32,
    "batch_size": 4,
    "epochs": 2,
    "learning_rate": 3e-3,
    "precision": "fp32",
}


def tiny_config(**changes: Any) -> TrainConfig:
    """A run of seconds; `changes` are fields of `TrainConfig`."""
    parts: dict[str, Any] = {
        "generator": GeneratorConfig(**GENERATOR),
        "discriminator": DiscriminatorConfig(width=4),
    }
    return TrainConfig(**{**SETTINGS, **parts, **changes})


def tiny_flags(**changes: Any) -> list[str]:
    """The same as `--set` flags; `changes` are dotted keys with `__` for the dot."""
    values = {f"generator.{key}": value for key, value in GENERATOR.items()}
    values |= {"discriminator.width": 4, **SETTINGS}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    flags = []
    for key, value in values.items():
        text = str(list(value) if isinstance(value, tuple) else value)
        flags += ["--set", f"{key}={text}"]
    return flags


def pixel_set(count: int, side: int = 32, first_seed: int = 0) -> PixelSet:
    """Drawn lesions, decoded."""
    photos = [lesion_photo(first_seed + i, side, side) for i in range(count)]
    return PixelSet(
        tuple(f"lesion_{first_seed + i:03d}" for i in range(count)),
        np.stack([p.pixels.transpose(2, 0, 1) for p in photos]),
        np.stack([p.mask[None].astype(np.uint8) * 255 for p in photos]),
    )


def write_pair(images: Path, masks: Path, name: str, seed: int, side: int = 40) -> None:
    """One drawn lesion as `name.jpg` and `name_segmentation.png`."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    photo = lesion_photo(seed, side, side)
    (images / f"{name}.jpg").write_bytes(encode_photo(photo.pixels))
    Image.fromarray(photo.mask).save(masks / f"{name}_segmentation.png")


def write_isic2017(root: Path, training: int = 10, validation: int = 3) -> Path:
    """An official 2017 release in small."""
    for part, count, first in (("Training", training, 0), ("Validation", validation, 500)):
        for i in range(first, first + count):
            images = root / f"ISIC-2017_{part}_Data"
            masks = root / f"ISIC-2017_{part}_Part1_GroundTruth"
            write_pair(images, masks, f"ISIC_{i:07d}", i)
    return root


@contextmanager
def changed_checkpoint(run: Path, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """`last.pt` of a run with its state changed, and as it was again at the end."""
    last = run / "last.pt"
    whole = last.read_bytes()
    state = torch.load(last, weights_only=True)
    change(state)
    torch.save(state, last)
    try:
        yield
    finally:
        last.write_bytes(whole)
