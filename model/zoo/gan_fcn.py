"""In the place of GAN-FCN: LinkNet on ResNet-18, trained as any network here.

Source: Bi et al. 2018, "Improving automatic skin lesion segmentation using adversarial learning
based data augmentation" (arXiv:1807.08392). A GAN draws more photos from masks, and a fully
convolutional residual network is trained on both.
Implementation: segmentation-models-pytorch (MIT). Network: Chaurasia and Culurciello 2017,
"LinkNet" (arXiv:1707.03718).
Substituted: all of it. The text gives no architecture; this is a residual network of like size
(10.6 million parameters are named in SLSNet's paper). The GAN's photos are not made: all networks
here are trained on the same augmentation.
Not to be had: ResNet's ImageNet weights.
"""

from typing import cast

from torch import Tensor

import model.zoo.vision  # noqa: F401, before what needs torchvision

# isort: split
import segmentation_models_pytorch as smp

from model.zoo.network import IMAGENET_MEAN, IMAGENET_STD, ZooNetwork


class GANFCN(ZooNetwork):
    """The substitute."""

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self) -> None:
        super().__init__()
        self.body = smp.Linknet("resnet18", encoder_weights=None, classes=1)

    def logits(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.body(image))
