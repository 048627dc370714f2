"""SegNet: VGG-16's convolutions, and their mirror image, which unpools to where the maxima were.

Source: Badrinarayanan et al. 2015, "SegNet: a deep convolutional encoder-decoder architecture for
image segmentation" (arXiv:1511.00561), figure 2. Written here after the paper (Apache-2.0).
Faithful: 13 convolutions down and 13 up, each with batch normalisation, and index unpooling.
Substituted: one class. At width 40 it has the 11.5 million parameters that SLSNet's paper gives for
it; VGG's own width is 64.
Not to be had: VGG-16's ImageNet weights, from which its encoder starts.
"""

from itertools import pairwise

from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import ZooNetwork
from model.zoo.unpooling import max_pool, max_unpool

_DEPTHS = (2, 2, 3, 3, 3)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), BatchNorm(outputs), nn.ReLU(inplace=True)
    )


class SegNet(ZooNetwork):
    """The network of figure 2.

    Args:
        width: channels at full resolution; below there are 2, 4, 8 and 8 times as many.
    """

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8, 8)]
        stages = list(zip([3, *widths[:-1]], widths, _DEPTHS, strict=True))
        self.encoder = nn.ModuleList(
            nn.Sequential(*(_convolution(*ends) for ends in pairwise([inputs, *[outputs] * depth])))
            for inputs, outputs, depth in stages
        )
        mirrored = [
            [_convolution(*ends) for ends in pairwise([*[outputs] * depth, inputs])]
            for inputs, outputs, depth in reversed(stages)
        ]
        mirrored[-1][-1] = nn.Sequential(nn.Conv2d(width, 1, 3, padding=1))
        self.decoder = nn.ModuleList(nn.Sequential(*stage) for stage in mirrored)

    def logits(self, image: Tensor) -> Tensor:
        x, maxima = image, []
        for stage in self.encoder:
            x, places = max_pool(stage(x))  # half as large
            maxima.append(places)
        for stage, places in zip(self.decoder, reversed(maxima), strict=True):
            x = stage(max_unpool(x, places))  # twice as large
        return x
