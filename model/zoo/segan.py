"""SegAN: a segmentor trained against a critic, which compares features of masked photos.

Source: Xue et al. 2017, "SegAN: adversarial network with multi-scale L1 loss for medical image
segmentation" (arXiv:1706.01805), and the authors' published code (MIT), which adds Dice's loss.
Written here anew (Apache-2.0).
Faithful: widths, kernels, residual blocks and wide 1-D convolutions of their segmentor, their
critic (`Critic`), and the multi-scale L1 loss that both are trained by: `loss.critic=1` beside
another loss. The critic's weights are clipped, as theirs are.
Substituted: the image is normalised for the segmentor. Their Dice loss is `loss.jaccard` here.
Their segmentor has 156 million parameters and its critic 9; SLSNet's paper names 382 for both.
No pre-trained weights were used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import ZooNetwork


def _act(leaky: bool) -> nn.Module:
    return nn.LeakyReLU(0.2) if leaky else nn.ReLU()


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, leaky: bool
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False),
        BatchNorm(outputs),
        _act(leaky),
    )


class _Residual(nn.Module):
    """Expansion to twice the channels, 3×3, and back, without normalisation."""

    def __init__(self, channels: int, *, leaky: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            _act(leaky),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False),
            _act(leaky),
            nn.Conv2d(2 * channels, channels, 1, bias=False),
            _act(leaky),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Pointwise(nn.Module):
    """A 1×1 convolution beside the identity."""

    def __init__(self, channels: int, *, leaky: bool) -> None:
        super().__init__()
        self.body = _convolution(channels, channels, 1, leaky=leaky)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Wide(nn.Module):
    """k×1 then 1×k, beside 1×k then k×1; summed, normalised."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        rows, columns = ((kernel, 1), (kernel // 2, 0)), ((1, kernel), (0, kernel // 2))

        def path(*ways: tuple[tuple[int, int], tuple[int, int]]) -> nn.Sequential:
            ends = (inputs, outputs), (outputs, outputs)
            return nn.Sequential(
                *(
                    nn.Conv2d(*end, way[0], padding=way[1])
                    for end, way in zip(ends, ways, strict=True)
                )
            )

        self.left, self.right = path(rows, columns), path(columns, rows)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.left(x) + self.right(x)))


class SegAN(ZooNetwork):
    """The segmentor.

    Args:
        width: channels at half resolution; at 1/128 there are 32 times as many.
    """

    multiple = 64

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = [width * factor for factor in (1, 2, 4, 8, 8, 16, 32)]

        def down(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
            return _convolution(inputs, outputs, kernel, 2, leaky=True)

        self.encoder = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, w[0], 7, 2, 3, bias=False), _act(True), _Residual(w[0], leaky=True)
                ),
                *(
                    nn.Sequential(down(w[i - 1], w[i], 5), _Residual(w[i], leaky=True))
                    for i in (1, 2, 3, 4)
                ),
                nn.Sequential(down(w[4], w[5], 4), _Pointwise(w[5], leaky=True)),
                down(w[5], w[6], 3),
            ]
        )
        self.deepest = nn.Sequential(
            _convolution(w[6], w[3], 1, leaky=True), _convolution(w[3], w[6], 1, leaky=False)
        )
        self.decoder = nn.ModuleList(
            [
                nn.Sequential(
                    _convolution(2 * w[6], w[5], 3, leaky=False), _Pointwise(w[5], leaky=False)
                ),
                nn.Sequential(
                    _convolution(2 * w[5], w[4], 3, leaky=False), _Residual(w[4], leaky=False)
                ),
                *(
                    nn.Sequential(_Wide(2 * w[i + 1], w[i], k), _Residual(w[i], leaky=False))
                    for i, k in ((3, 7), (2, 7), (1, 9), (0, 9))
                ),
                nn.Sequential(_Wide(2 * w[0], w[0], 11), _Residual(w[0], leaky=False)),
            ]
        )
        self.head = nn.Conv2d(w[0], 1, 5, padding=2, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def logits(self, image: Tensor) -> Tensor:
        x, skips = image, []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)  # half as large
        y = self.deepest(x)
        for stage in self.decoder:
            x = torch.cat([x, y], 1)
            skip = skips.pop()
            y = stage(F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False))
            x = skip
        logits: Tensor = self.head(y)
        return logits


class Critic(nn.Module):
    """The features that the multi-scale L1 loss compares.

    Args:
        width: channels at half resolution.
    """

    CLIP = 0.05
    """After each of its steps, every weight is within plus and minus so much."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = [width * factor for factor in (1, 2, 4, 8, 8, 8)]
        kernels = ((5, 2), (4, 1), (4, 1), (4, 1), (3, 1))
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, w[0], 7, 2, 3, bias=False), _act(True))]
        )
        for i, (kernel, padding) in enumerate(kernels):
            self.layers.append(
                nn.Sequential(
                    nn.Conv2d(w[i], w[i + 1], kernel, 2, padding, bias=False),
                    BatchNorm(w[i + 1]),
                    _act(True),
                )
            )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """The photo under the mask, and its features at six scales, each with its weight.

        Args:
            image: float [n, 3, H, W], RGB in [0, 1].
            mask: float [n, 1, H, W], probability or truth.

        Returns:
            Float [n, values]: the loss is the mean absolute difference of two of these.
        """
        x = image * mask
        features = [x.flatten(1)]
        for weight, layer in zip((1, 2, 2, 2, 2, 4), self.layers, strict=True):
            x = layer(x)
            features.append(weight * x.flatten(1))
        return torch.cat(features, 1)
