"""FrCN: VGG-16's convolutions at full resolution throughout, without any pooling.

Source: Al-Masni et al. 2018, "Skin lesion segmentation in dermoscopy images via deep full
resolution convolutional networks" (doi:10.1016/j.cmpb.2018.05.027). Written here after the paper
(Apache-2.0).
Faithful: 13 convolutions of VGG-16's widths, no pooling, dropout in the head.
Substituted: the text does not give the head's widths. Two 1×1 convolutions of 1,024 channels are a
guess, which gives the 16.3 million parameters that SLSNet's paper names; batch normalisation,
without which so deep a network does not train from scratch. Its input was 192×256.
Not to be had: weights to start from. An image of 128×128 takes 267 billion products, 241 of them in
VGG's convolutions, so the network is slow.
"""

from itertools import pairwise

from torch import Tensor, nn

from model.layers import BatchNorm
from model.zoo.network import ZooNetwork


class FrCN(ZooNetwork):
    """The network.

    Args:
        width: channels of VGG's first stage; the others and the head's 16 × width follow it.
    """

    multiple = 1

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        factors = (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([3, *(width * factor for factor in factors)]):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                BatchNorm(outputs),
                nn.ReLU(inplace=True),
            ]
        for inputs in (8 * width, 16 * width):
            layers += [nn.Conv2d(inputs, 16 * width, 1), nn.ReLU(), nn.Dropout2d(0.5)]
        self.body = nn.Sequential(*layers, nn.Conv2d(16 * width, 1, 1))

    def logits(self, image: Tensor) -> Tensor:
        logits: Tensor = self.body(image)
        return logits
