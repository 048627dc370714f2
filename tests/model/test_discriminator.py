"""The discriminator of section 3.0.3."""

import pytest
import torch
from torch import nn

from model.config import DiscriminatorConfig
from model.discriminator import Discriminator
from model.layers import ChannelAttention, PositionAttention


def test_it_is_the_papers_size() -> None:
    assert sum(p.numel() for p in Discriminator().parameters()) == 715_075


@pytest.mark.parametrize("size", [64, 128, 256])
@torch.inference_mode()
def test_one_logit_a_patch(size: int) -> None:
    image, mask = torch.rand(2, 3, size, size), torch.rand(2, 1, size, size)
    assert Discriminator()(image, mask).shape == (2, 1, size // 16, size // 16)


def test_attention_follows_the_second_and_third_layer() -> None:
    kinds = [type(m) for m in Discriminator().layers]
    convolutions = [i for i, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert convolutions[1] < kinds.index(PositionAttention) < convolutions[2]
    assert convolutions[2] < kinds.index(ChannelAttention) < convolutions[3]
    bare = Discriminator(DiscriminatorConfig(pam=False, cam=False))
    assert not any(isinstance(m, PositionAttention | ChannelAttention) for m in bare.modules())
    assert sum(p.numel() for p in bare.parameters()) == 715_075 - 3 * (128 * 129 + 2 * 128) - 2


def test_it_looks_at_image_and_mask_and_learns_everywhere() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(DiscriminatorConfig(width=8))
    for module in discriminator.modules():
        if isinstance(module, PositionAttention):
            nn.init.constant_(module.eta, 0.3)
        elif isinstance(module, ChannelAttention):
            nn.init.constant_(module.gamma, 0.3)
    image = torch.rand(2, 3, 64, 64, requires_grad=True)
    mask = torch.rand(2, 1, 64, 64, requires_grad=True)
    discriminator(image, mask).square().mean().backward()
    assert image.grad is not None and image.grad.any()
    assert mask.grad is not None and mask.grad.any()
    assert all(p.grad is not None for p in discriminator.parameters())
    weights = [p for p in discriminator.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.any() for p in weights)
