"""The U-Net: five resolutions, two convolutions at each, skips from encoder to decoder.

Source: Ronneberger et al. 2015, "U-Net: convolutional networks for biomedical image segmentation"
(arXiv:1505.04597), figure 1. Written here after the paper (Apache-2.0).
Faithful: depth, the doubling of channels from 64 to 1,024, learned up-sampling, skips.
Substituted: convolutions keep the size (the paper's lose a border), and each is followed by batch
normalisation, without which it does not train well from scratch; one class and no weighted border.
At width 40 it has the 12 million parameters that SLSNet's paper gives for it.
"""

import torch
from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import ZooNetwork


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            BatchNorm(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(ZooNetwork):
    """The network of figure 1.

    Args:
        width: channels at full resolution; each of the four below has twice as many.
    """

    multiple = 16

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.encoder = nn.ModuleList(
            _convolutions(inputs, outputs)
            for inputs, outputs in zip((3, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * outputs, outputs, 2, stride=2) for outputs in widths[-2::-1]
        )
        self.decoder = nn.ModuleList(
            _convolutions(2 * outputs, outputs) for outputs in widths[-2::-1]
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, 1, 1)

    def logits(self, image: Tensor) -> Tensor:
        x, skips = self.encoder[0](image), []
        for stage in list(self.encoder)[1:]:
            skips.append(x)
            x = stage(self.pool(x))  # half as large, twice the channels
        for up, stage, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = stage(torch.cat([skip, up(x)], 1))
        logits: Tensor = self.head(x)
        return logits
