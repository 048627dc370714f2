"""FCN-8s: VGG-16 with its classifier as convolutions, and two skips.

Source: Long et al. 2014, "Fully convolutional networks for semantic segmentation"
(arXiv:1411.4038), section 4 and figure 3. Written here after the paper (Apache-2.0).
Faithful: 13 convolutions of VGG-16, fc6 of 7×7×4096 and fc7 of 4096, scores of pool3, pool4 and
fc7 that are added up, up-sampling by deconvolution that starts as bilinear interpolation.
Substituted: one class; fc6 keeps the size, in place of a border of 100 pixels around the image.
Not to be had: VGG-16's ImageNet weights, from which the authors' network started.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.zoo.network import ZooNetwork


def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in range(depth):
        layers += [nn.Conv2d(outputs if layer else inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


def _up(factor: int) -> nn.ConvTranspose2d:
    """Up-sampling of one channel, at first bilinear."""
    layer = nn.ConvTranspose2d(1, 1, 2 * factor, factor, padding=factor // 2, bias=False)
    ramp = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    layer.weight = nn.Parameter((ramp[:, None] * ramp)[None, None])
    return layer


class _Fc6(nn.Conv2d):
    """A convolution that is learnt as a matrix product.

    On processors with AVX2 alone, oneDNN takes 30 times as long for the gradient of a 7×7 kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        columns = F.unfold(x, self.kernel_size, padding=self.kernel_size[0] // 2)
        y = F.linear(columns.transpose(1, 2), self.weight.flatten(1), self.bias)
        return y.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class FCN8s(ZooNetwork):
    """The network of figure 3.

    Args:
        width: channels of VGG's first stage; the others and the classifier's 64 × width follow it.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w, wide = width, 64 * width
        self.pool3 = nn.Sequential(_stage(3, w, 2), _stage(w, 2 * w, 2), _stage(2 * w, 4 * w, 3))
        self.pool4, self.pool5 = _stage(4 * w, 8 * w, 3), _stage(8 * w, 8 * w, 3)
        self.classifier = nn.Sequential(
            _Fc6(8 * w, wide, 7, padding=3),
            nn.ReLU(),
            nn.Dropout2d(0.5),
            nn.Conv2d(wide, wide, 1),
            nn.ReLU(),
            nn.Dropout2d(0.5),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.score3, self.score4, self.score7 = (
            nn.Conv2d(channels, 1, 1) for channels in (4 * w, 8 * w, wide)
        )
        self.up7, self.up4, self.up3 = _up(2), _up(2), _up(8)

    def logits(self, image: Tensor) -> Tensor:
        pool3 = self.pool3(image)  # [n, 256, H/8, W/8]
        pool4 = self.pool4(pool3)  # [n, 512, H/16, W/16]
        scores = self.up7(self.score7(self.classifier(self.pool5(pool4))))
        scores = self.up4(scores + self.score4(pool4))
        logits: Tensor = self.up3(scores + self.score3(pool3))
        return logits
