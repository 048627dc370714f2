"""SLSDeep: a dilated ResNet-50, pyramid pooling, and a loss that looks at the border.

Source: Sarker et al. 2018, "SLSDeep: skin lesion segmentation based on dilated residual and pyramid
pooling networks" (arXiv:1805.10241), section 2. Encoder: torchvision's ResNet-50 (BSD-3-Clause).
Faithful: dilated last stages, pooling over 1, 2, 3 and 6 cells a side, and the loss, which is the
cross-entropy and the end-point error of the masks' gradients (`loss.bce=1 loss.endpoint=1
loss.jaccard=0`; other losses train it too).
Substituted: the text leaves the head's widths open. Those of PSPNet (Zhao et al. 2016,
arXiv:1612.01105) give 46.58 of the 46.65 million parameters that SLSNet's paper names.
Not to be had: ResNet's ImageNet weights, from which its encoder starts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import IMAGENET_MEAN, IMAGENET_STD, ZooNetwork
from model.zoo.vision import torchvision

_CELLS = (1, 2, 3, 6)
_BLOCKS = {50: (3, 4, 6, 3), 14: (1, 1, 1, 1)}


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        BatchNorm(outputs),
        nn.ReLU(inplace=True),
    )


class SLSDeep(ZooNetwork):
    """The network of figure 2.

    Args:
        depth: 50, as published, or 14 with one block a stage, for trials.
        width: channels of each pooled map, and of the convolution after them.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    multiple = 8

    def __init__(self, depth: int = 50, width: int = 512) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth is one of {', '.join(map(str, _BLOCKS))}, not {depth}")
        encoder = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck,
            _BLOCKS[depth],
            replace_stride_with_dilation=[False, True, True],
        )
        layers = list(encoder.children())[:-2]  # without the classifier
        self.encoder = nn.Sequential(*layers)
        self.pooled = nn.ModuleList(_convolution(2048, width, 1) for _ in _CELLS)
        self.head = nn.Sequential(
            _convolution(2048 + 4 * width, width, 3), nn.Dropout2d(0.1), nn.Conv2d(width, 1, 1)
        )

    def logits(self, image: Tensor) -> Tensor:
        x = self.encoder(image)  # [n, 2048, H/8, W/8]
        maps = [x]
        for cells, convolution in zip(_CELLS, self.pooled, strict=True):
            pooled = convolution(_average(x, cells))
            maps.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
        logits: Tensor = self.head(torch.cat(maps, 1))
        return logits


def _average(x: Tensor, cells: int) -> Tensor:
    """Averages over cells × cells parts of x, as `F.adaptive_avg_pool2d`, in what exports."""
    height, width = x.shape[2:]
    for axis, side in ((2, height), (3, width)):
        parts = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        means = [
            x.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in parts
        ]
        x = torch.cat(means, axis)
    return x
