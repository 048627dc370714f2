"""LR-ASPP on MobileNetV3-Large, the usual light choice today.

Source: Howard et al. 2019, "Searching for MobileNetV3" (arXiv:1905.02244), sections 5.3 and 6.4.
Implementation: torchvision (BSD-3-Clause), with one class in place of its 21.
Faithful: the whole network: dilated last stage, 128 channels in the head, skip from 1/8 resolution.
Substituted: norms keep a running mean over some 10 steps, as in the other networks, and not over
some 100: in a short training from scratch those lag so far behind that masks are empty.
Not to be had: torchvision's weights from ImageNet and COCO, so it is trained from scratch.
"""

from typing import cast

from torch import Tensor, nn

from model.zoo.network import IMAGENET_MEAN, IMAGENET_STD, ZooNetwork
from model.zoo.vision import torchvision


class LRASPP(ZooNetwork):
    """Logits are those of torchvision's network, scaled up from 1/8 resolution."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self) -> None:
        super().__init__()
        self.body = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=1
        )
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1

    def logits(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.body(image)["out"])
