"""SLSNet's generator: an RGB image goes in, lesion logits come out at the image's own resolution.

    multiscale block → 2 × down-sampling attention → 4 × FCM → down-sampling attention
    → 8 × dilated FCM → factorised layer → CAM ∥ PAM
    → 2 × (up-sampling attention → 2 × FCM) → deconvolution

Source: Sarker et al. 2019, figure 1 and section 3.0.1 to 3.0.2.
"""

import dataclasses
import json
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import GeneratorConfig
from model.layers import (
    ChannelAttention,
    DownSampler,
    FactorisedLayer,
    MultiscaleBlock,
    PositionAttention,
    UpSampler,
    factorised_attention,
)
from photos.image import MODEL_SIZE

# Mean and deviation of RGB in [0, 1] over the training images of ISIC 2017 and 2018.
RGB_MEAN = (0.708, 0.582, 0.536)
RGB_STD = (0.157, 0.166, 0.182)


class Generator(nn.Module):
    """The network that segments.

    Args:
        config: the architecture; by default the paper's (2,347,900 parameters).
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or GeneratorConfig()
        cam = c.cam_form if c.cam else None
        stem, half, quarter, eighth = c.widths
        shallow, deep = c.encoder_dropout

        pool_half, pool_quarter = c.pam_pool

        def decoder_stage(inputs: int, outputs: int, pool: int) -> nn.Sequential:
            blocks = (
                factorised_attention(outputs, cam, dropout=c.decoder_dropout)
                for _ in range(c.decoder_blocks)
            )
            return nn.Sequential(UpSampler(inputs, outputs, c.pam, pool), *blocks)

        self.multiscale = MultiscaleBlock(stem, cam, (1, 2, 4, 8) if c.multiscale else (1,))
        self.down1 = DownSampler(stem, half, c.pam, pool_half)
        self.down2 = DownSampler(half, quarter, c.pam, pool_quarter)
        self.encoder1 = nn.Sequential(
            *(factorised_attention(quarter, cam, 1, shallow) for _ in range(c.encoder_blocks))
        )
        self.down3 = DownSampler(quarter, eighth, c.pam)
        self.encoder2 = nn.Sequential(
            *(factorised_attention(eighth, cam, d, deep) for d in c.dilations)
        )
        self.bridge = FactorisedLayer(eighth, dropout=deep)
        self.bridge_cam = ChannelAttention(c.cam_form) if c.cam else None
        self.bridge_pam = PositionAttention(eighth) if c.pam else None
        self.decoder1 = decoder_stage(eighth, quarter, pool_quarter)
        self.decoder2 = decoder_stage(quarter, stem, pool_half)
        self.head = nn.ConvTranspose2d(stem, 1, 3, stride=2, padding=1, output_padding=1)
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(RGB_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch of images.

        Args:
            image: float [n, 3, H, W], RGB in [0, 1]; H and W are multiples of 8.

        Returns:
            Lesion logits, [n, 1, H, W].

        Raises:
            ValueError: the image has another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images [n, 3, H, W], got {list(image.shape)}")
        if not torch.compiler.is_exporting() and (image.shape[2] % 8 or image.shape[3] % 8):
            raise ValueError(
                f"image is {image.shape[3]}×{image.shape[2]}; both sides must be multiples of 8"
            )
        x = (image - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        x = self.multiscale(x)  # [n, 16, H, W]
        x = self.down2(self.down1(x))  # [n, 64, H/4, W/4]
        x = self.down3(self.encoder1(x))  # [n, 128, H/8, W/8]
        x = self.bridge(self.encoder2(x))
        attended = [m(x) for m in (self.bridge_cam, self.bridge_pam) if m is not None]
        if attended:
            x = torch.stack(attended).sum(0) if len(attended) > 1 else attended[0]
        x = self.decoder2(self.decoder1(x))  # [n, 16, H/2, W/2]
        return cast(Tensor, self.head(x))  # [n, 1, H, W]

    def half_resolution_attention(self) -> list[PositionAttention]:
        """The PAMs at half resolution, where 4096 × 4096 weights cost more than all the rest."""
        stages = (self.down1, self.decoder2[0])
        return [s.pam for s in stages if isinstance(s.pam, PositionAttention)]


def save_generator(
    generator: Generator, path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write weights and architecture to a safetensors file."""
    config = json.dumps(dataclasses.asdict(generator.config))
    state = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    save_file(state, path, {**(metadata or {}), "config": config})


def load_generator(path: Path) -> Generator:
    """Read a generator written by :func:`save_generator`, in evaluation mode.

    Raises:
        ValueError: the file holds no SLSNet generator, or its weights fit another architecture.
    """
    config = load_metadata(path).get("config")
    if config is None:
        raise ValueError(f"{path} holds no SLSNet generator: its metadata has no 'config'")
    try:
        generator = Generator(GeneratorConfig(**json.loads(config)))
        generator.load_state_dict(load_file(path))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds weights of another architecture: {error}") from error
    return generator.eval()


def input_size(path: Path, asked: int | None = None) -> int:
    """The side of the input that weights were trained with, pixels.

    Args:
        path: safetensors file with a generator.
        asked: the side that the caller wants. It decides alone where the file says none.

    Raises:
        ValueError: the file says another side than was asked for, or an impossible one.
    """
    said = load_metadata(path).get("size")
    if said is None:
        return asked or MODEL_SIZE
    if not said.isdecimal() or int(said) < 8 or int(said) % 8:
        raise ValueError(f"{path} says that its input has a side of {said!r}: no multiple of 8")
    if asked not in (None, int(said)):
        raise ValueError(f"{path} was trained for inputs of {said}×{said}, not {asked}×{asked}")
    return int(said)


def load_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Raises:
        ValueError: the file is missing or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors raises its own untyped errors
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
