"""EGE-UNet: a U-Net of 0.05 million parameters, with products in place of attention.

Source: Ruan et al. 2023, "EGE-UNet: an efficient group enhanced UNet for skin lesion segmentation"
(arXiv:2307.08473), figures 2 to 4; details after the authors' description of their code
(Apache-2.0). Written here anew (Apache-2.0).
Faithful: widths 8 to 64, group multi-axis Hadamard products, bridges that aggregate four groups and
read the coarse mask of the stage below.
Substituted: the five coarse masks feed the bridges but have no loss of their own.
The authors used no pre-trained weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.zoo.network import ZooNetwork

_WIDTHS = (8, 16, 24, 32, 48, 64)


def _scale(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class _LayerNorm(nn.Module):
    """Normalisation of each position over its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.weight + self.bias


class _Axis(nn.Module):
    """One group is multiplied by a learned map over two of its three axes.

    Args:
        channels: of the group.
        axis: what the map spans: `hw` rows and columns; `cw`, `ch` channels and columns, or rows.
    """

    def __init__(self, channels: int, axis: str) -> None:
        super().__init__()
        self.axis = axis
        shape = (1, channels, 8, 8) if axis == "hw" else (1, 1, channels, 8)
        kernel, padding = ((3, 3), (1, 1)) if axis == "hw" else ((1, 3), (0, 1))
        self.map = nn.Parameter(torch.ones(shape))
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        if self.axis == "hw":
            weights: Tensor = 1 + self.body(_scale(self.map, [height, width]))
            return x * weights
        side = width if self.axis == "cw" else height
        weights = 1 + self.body(_scale(self.map, [channels, side]).transpose(1, 2))
        return x * (weights if self.axis == "cw" else weights.transpose(2, 3))


class _Products(nn.Module):
    """The group multi-axis Hadamard product attention of figure 3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        group = inputs // 4
        self.norm, self.last_norm = _LayerNorm(inputs), _LayerNorm(inputs)
        local = nn.Sequential(
            nn.Conv2d(group, group, 1),
            nn.GELU(),
            nn.Conv2d(group, group, 3, padding=1, groups=group),
        )
        self.groups = nn.ModuleList([*(_Axis(group, axis) for axis in ("hw", "cw", "ch")), local])
        self.last = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs),
            nn.GELU(),
            nn.Conv2d(inputs, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(x).chunk(4, 1)
        x = torch.cat([group(part) for group, part in zip(self.groups, parts, strict=True)], 1)
        out: Tensor = self.last(self.last_norm(x))
        return out


class _Bridge(nn.Module):
    """The group aggregation bridge of figure 4: a skip that sees the stage below and its mask."""

    def __init__(self, below: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(below, channels, 1)
        group = channels // 2 + 1
        self.groups = nn.ModuleList(
            nn.Sequential(
                _LayerNorm(group),
                nn.Conv2d(group, group, 3, padding=d, dilation=d, groups=group),
            )
            for d in (1, 2, 5, 7)
        )
        self.last = nn.Sequential(_LayerNorm(4 * group), nn.Conv2d(4 * group, channels, 1))

    def forward(self, below: Tensor, skip: Tensor, mask: Tensor) -> Tensor:
        below = _scale(self.project(below), list(skip.shape[2:]))
        pairs = zip(self.groups, below.chunk(4, 1), skip.chunk(4, 1), strict=True)
        out: Tensor = self.last(
            torch.cat([group(torch.cat([a, b, mask], 1)) for group, a, b in pairs], 1)
        )
        return out


class EGEUNet(ZooNetwork):
    """The network of figure 2."""

    def __init__(self) -> None:
        super().__init__()
        w = _WIDTHS
        ends = list(zip((3, *w), w, strict=False))
        self.encoder = nn.ModuleList(
            nn.Conv2d(*end, 3, padding=1) if stage < 3 else _Products(*end)
            for stage, end in enumerate(ends)
        )
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(4, width) for width in w[:-1])
        self.decoder = nn.ModuleList(
            nn.Conv2d(w[i], w[i - 1], 3, padding=1) if i < 3 else _Products(w[i], w[i - 1])
            for i in (5, 4, 3, 2, 1)
        )
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(4, width) for width in w[-2::-1])
        self.masks = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in w[-2::-1])
        self.bridges = nn.ModuleList(_Bridge(w[i], w[i - 1]) for i in (5, 4, 3, 2, 1))
        self.head = nn.Conv2d(w[0], 1, 1)

    def logits(self, image: Tensor) -> Tensor:
        x, skips = image, []
        for stage, norm in zip(list(self.encoder)[:-1], self.encoder_norms, strict=True):
            x = F.gelu(F.max_pool2d(norm(stage(x)), 2))  # half as large
            skips.append(x)
        x = below = F.gelu(self.encoder[5](x))  # [n, 64, H/32, W/32]
        parts = zip(self.decoder, self.decoder_norms, self.masks, self.bridges, strict=True)
        for (stage, norm, mask, bridge), skip in zip(parts, reversed(skips), strict=True):
            x = norm(stage(x))
            if x.shape[2:] != skip.shape[2:]:
                x = _scale(x, list(skip.shape[2:]))
            x = F.gelu(x)
            below = bridge(below, skip, mask(x))
            x = x + below
        logits: Tensor = self.head(x)  # [n, 1, H/2, W/2]
        return logits
