"""ENet: bottlenecks at 1/4 and 1/8 resolution, with dilated and asymmetric convolutions.

Source: Paszke et al. 2016, "ENet: a deep neural network architecture for real-time semantic
segmentation" (arXiv:1606.02147), table 1 and figure 2. Written here after the paper (Apache-2.0).
Faithful: all 25 bottlenecks, index unpooling, PReLU for each channel, dropout.
Substituted: one class; one run, where the authors trained the encoder before the whole.
The authors used no pre-trained weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import ZooNetwork
from model.zoo.unpooling import max_pool, max_unpool


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int = 0, dilation: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        BatchNorm(outputs),
        nn.PReLU(outputs),
    )


class _Bottleneck(nn.Module):
    """Projection to a quarter of the channels, a convolution, and expansion, beside the input."""

    def __init__(
        self, channels: int, dropout: float, dilation: int = 1, asymmetric: bool = False
    ) -> None:
        super().__init__()
        inner = channels // 4
        self.project = _convolution(channels, inner)
        middle: nn.Module = _convolution(inner, inner, 3, padding=dilation, dilation=dilation)
        if asymmetric:
            middle = nn.Sequential(
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False),
                nn.Conv2d(inner, inner, (1, 5), padding=(0, 2), bias=False),
                BatchNorm(inner),
                nn.PReLU(inner),
            )
        self.middle = middle
        self.expand = nn.Sequential(
            nn.Conv2d(inner, channels, 1, bias=False), BatchNorm(channels), nn.Dropout2d(dropout)
        )
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.expand(self.middle(self.project(x))))
        return out


class _Down(nn.Module):
    """The bottleneck that halves the resolution; beside it, max-pool and channels of zeros."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        inner = inputs // 4
        self.added = outputs - inputs
        self.body = nn.Sequential(
            _convolution(inputs, inner, 2, stride=2),
            _convolution(inner, inner, 3, padding=1),
            nn.Conv2d(inner, outputs, 1, bias=False),
            BatchNorm(outputs),
            nn.Dropout2d(dropout),
        )
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = max_pool(x)
        pooled = F.pad(pooled, (0, 0, 0, 0, 0, self.added))
        return self.act(pooled + self.body(x)), places


class _Up(nn.Module):
    """The bottleneck that doubles the resolution; beside it, a projection that is unpooled."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        inner = inputs // 4
        self.main = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), BatchNorm(outputs))
        self.body = nn.Sequential(
            _convolution(inputs, inner),
            nn.ConvTranspose2d(inner, inner, 3, 2, padding=1, output_padding=1, bias=False),
            BatchNorm(inner),
            nn.PReLU(inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            BatchNorm(outputs),
            nn.Dropout2d(dropout),
        )
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        out: Tensor = self.act(max_unpool(self.main(x), places) + self.body(x))
        return out


def _stage(channels: int) -> nn.Sequential:
    """The eight bottlenecks of sections 2 and 3 in table 1."""
    blocks = []
    for first, second in ((2, 4), (8, 16)):
        blocks += [
            _Bottleneck(channels, 0.1),
            _Bottleneck(channels, 0.1, first),
            _Bottleneck(channels, 0.1, asymmetric=True),
            _Bottleneck(channels, 0.1, second),
        ]
    return nn.Sequential(*blocks)


class ENet(ZooNetwork):
    """The network of table 1.

    Args:
        width: channels at half resolution; 1/4 has four times, 1/8 eight times as many.
    """

    multiple = 8

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        half, quarter, eighth = width, 4 * width, 8 * width
        self.first = nn.Conv2d(3, half - 3, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.Sequential(BatchNorm(half), nn.PReLU(half))
        self.down1 = _Down(half, quarter, 0.01)
        self.stage1 = nn.Sequential(*(_Bottleneck(quarter, 0.01) for _ in range(4)))
        self.down2 = _Down(quarter, eighth, 0.1)
        self.stage2, self.stage3 = _stage(eighth), _stage(eighth)
        self.up4 = _Up(eighth, quarter, 0.1)
        self.stage4 = nn.Sequential(*(_Bottleneck(quarter, 0.1) for _ in range(2)))
        self.up5 = _Up(quarter, half, 0.1)
        self.stage5 = _Bottleneck(half, 0.1)
        self.head = nn.ConvTranspose2d(half, 1, 2, stride=2)

    def logits(self, image: Tensor) -> Tensor:
        x = torch.cat([self.first(image), F.max_pool2d(image, 2)], 1)  # [n, 16, H/2, W/2]
        x, half = self.down1(self.first_norm(x))
        x, quarter = self.down2(self.stage1(x))  # [n, 128, H/8, W/8]
        x = self.stage3(self.stage2(x))
        x = self.stage4(self.up4(x, quarter))  # [n, 64, H/4, W/4]
        x = self.stage5(self.up5(x, half))  # [n, 16, H/2, W/2]
        logits: Tensor = self.head(x)
        return logits
