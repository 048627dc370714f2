"""SLSNet's discriminator: it judges whether a mask is the annotator's or the generator's.

Source: Sarker et al. 2019, section 3.0.3; a PatchGAN (Isola et al. 2017) with PAM after its second
and CAM after its third layer.
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.config import DiscriminatorConfig
from model.layers import BatchNorm, ChannelAttention, PositionAttention


class Discriminator(nn.Module):
    """Four stride-2 convolutions over image and mask (715,075 parameters by default)."""

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        c = config or DiscriminatorConfig()
        w = c.width

        def down(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)

        self.layers = nn.Sequential(
            down(4, w),
            nn.LeakyReLU(0.2),
            down(w, 2 * w),
            BatchNorm(2 * w),
            nn.LeakyReLU(0.2),
            PositionAttention(2 * w) if c.pam else nn.Identity(),
            down(2 * w, 4 * w),
            BatchNorm(4 * w),
            nn.LeakyReLU(0.2),
            ChannelAttention(c.cam_form) if c.cam else nn.Identity(),
            down(4 * w, 1),
        )

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Judge a mask.

        Args:
            image: float [n, 3, H, W], RGB in [0, 1].
            mask: float [n, 1, H, W], lesion probability or ground truth in [0, 1].

        Returns:
            Logits of "the annotator's", [n, 1, H/16, W/16]; the paper's output is their sigmoid.
        """
        # centred on 0, so that image and mask weigh alike in the first layer
        return cast(Tensor, self.layers(torch.cat([image, mask], 1) * 2 - 1))
