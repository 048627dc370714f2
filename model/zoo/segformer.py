"""SegFormer-B0: a hierarchical transformer, and a decoder of linear layers alone.

Source: Xie et al. 2021, "SegFormer: simple and efficient design for semantic segmentation with
transformers" (arXiv:2105.15203), tables 1 and 6. NVIDIA's own code and weights may not be used
commercially; neither is used here.
Implementation: segmentation-models-pytorch (MIT).
Faithful: encoder B0, decoder of 256 channels, logits at 1/4 resolution, scaled up.
Not to be had: its ImageNet weights, from which it starts. From scratch a transformer needs more
photos than there are.
"""

from typing import cast

from torch import Tensor

import model.zoo.vision  # noqa: F401, before what needs torchvision

# isort: split
import segmentation_models_pytorch as smp

from model.zoo.network import IMAGENET_MEAN, IMAGENET_STD, ZooNetwork


class SegFormer(ZooNetwork):
    """The network.

    Args:
        width: channels of the decoder.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.body = smp.Segformer(
            "mit_b0", encoder_weights=None, decoder_segmentation_channels=width, classes=1
        )

    def logits(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.body(image))
