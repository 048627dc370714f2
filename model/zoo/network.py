"""What all networks of the zoo have in common: what goes in, what comes out, how they are named."""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.generator import RGB_MEAN, RGB_STD
from model.names import Option

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ZooNetwork(nn.Module):
    """A network of the zoo. A subclass sets `logits`."""

    mean: ClassVar[tuple[float, float, float]] = RGB_MEAN
    """Of RGB in [0, 1]: subtracted from the image, before it is divided by `std`."""
    std: ClassVar[tuple[float, float, float]] = RGB_STD
    multiple: ClassVar[int] = 32
    """Both sides of an image are multiples of it."""

    name: str
    """As `model.zoo.build` was told."""
    options: dict[str, Option]

    def __init__(self) -> None:
        super().__init__()
        for what, values in (("shift", self.mean), ("scale", self.std)):
            self.register_buffer(what, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Segment a batch of images.

        Args:
            image: float [n, 3, H, W], RGB in [0, 1].

        Returns:
            Lesion logits, [n, 1, H, W].

        Raises:
            ValueError: the image has another shape, or its sides are no multiples of `multiple`.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected images [n, 3, H, W], got {list(image.shape)}")
        height, width = image.shape[2:]
        if not torch.compiler.is_exporting() and (height % self.multiple or width % self.multiple):
            raise ValueError(
                f"image is {width}×{height}; both sides must be multiples of {self.multiple}"
            )
        logits = self.logits((image - cast(Tensor, self.shift)) / cast(Tensor, self.scale))
        if logits.shape[2:] != image.shape[2:]:
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        return logits

    def logits(self, image: Tensor) -> Tensor:
        """Lesion logits [n, 1, H/k, W/k] of the normalised image. A coarse map is scaled up."""
        raise NotImplementedError

    def start(self) -> None:
        """Take weights to start a training from, where a package carries some."""
