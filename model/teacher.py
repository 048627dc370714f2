"""A larger network to distil from: a residual U-Net of 14.8 M parameters, never served.

References: U-Net (Ronneberger et al. 2015), pre-activation residual blocks (He et al. 2016),
squeeze and excitation (Hu et al. 2018).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.generator import RGB_MEAN, RGB_STD
from model.layers import BatchNorm

_WIDTHS = (32, 64, 128, 256, 512)


class _Block(nn.Module):
    """A block of two 3×3 convolutions, squeeze and excitation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            BatchNorm(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            BatchNorm(outputs),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(outputs, max(outputs // 8, 8), 1),
            nn.ReLU(),
            nn.Conv2d(max(outputs // 8, 8), outputs, 1),
            nn.Sigmoid(),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return cast(Tensor, out * self.gate(out) + self.shortcut(x))


class Teacher(nn.Module):
    """The residual U-Net. Input and output are those of :class:`model.generator.Generator`."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        w = _WIDTHS
        self.stem = nn.Conv2d(3, w[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.Sequential(
                _Block(w[max(i - 1, 0)], w[i], dropout if i > 2 else 0),
                _Block(w[i], w[i], dropout if i > 2 else 0),
            )
            for i in range(len(w))
        )
        self.decoder = nn.ModuleList(
            _Block(w[i] + w[i + 1], w[i], 0) for i in reversed(range(len(w) - 1))
        )
        self.head = nn.Sequential(BatchNorm(w[0]), nn.ReLU(), nn.Conv2d(w[0], 1, 1))
        self.register_buffer("mean", torch.tensor(RGB_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(RGB_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Float [n, 3, H, W] in [0, 1] → lesion logits [n, 1, H, W]; sides are multiples of 16."""
        x = self.stem((image - cast(Tensor, self.mean)) / cast(Tensor, self.std))
        skips = []
        for i, stage in enumerate(self.encoder):
            x = stage(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], 1))
        return cast(Tensor, self.head(x))
