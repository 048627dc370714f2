"""The building blocks against the paper's equations, written as naively as they are printed."""

import copy
import math
from itertools import product
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CamForm
from model.layers import (
    BatchNorm,
    ChannelAttention,
    DownSampler,
    FactorisedLayer,
    MultiscaleBlock,
    PositionAttention,
    UpSampler,
    factorised_attention,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(n: int, channels: int, height: int, width: int) -> Tensor:
    """What a ReLU lets through, large enough for a softmax to prefer someone."""
    return torch.randn(n, channels, height, width).relu()


def naive_pam(pam: PositionAttention, x: Tensor) -> Tensor:
    """Eqs. 3 and 4, position by position; keys and values are means of `pool`×`pool` positions."""
    n, channels, height, width = x.shape
    p = pam.pool

    def mean(y: Tensor) -> Tensor:
        squares = [
            y[:, :, i : i + p, j : j + p].mean((2, 3))
            for i, j in product(range(0, height, p), range(0, width, p))
        ]
        return torch.stack(squares, 2)

    b, c, d = mean(pam.key(x)), pam.query(x).reshape(n, channels, -1), mean(pam.value(x))
    out = torch.empty_like(x).reshape(n, channels, -1)
    count = b.shape[2]
    for image, j in product(range(n), range(height * width)):
        weights = [math.exp(float(b[image, :, i] @ c[image, :, j])) for i in range(count)]
        total = sum(weights)
        s = [w / total for w in weights]
        out[image, :, j] = sum(
            (s[i] * d[image, :, i] for i in range(count)), start=torch.zeros(channels)
        )
    return x + pam.eta * out.reshape_as(x)


def naive_cam(a: Tensor, gamma: float, form: CamForm) -> Tensor:
    """Eqs. 1 and 2, channel by channel."""
    channels = a.shape[1]
    out = torch.zeros_like(a)
    for image, j in product(range(len(a)), range(channels)):
        energies = [float((a[image, i] * a[image, j]).sum()) for i in range(channels)]
        if form == "danet":
            energies = [max(energies) - e for e in energies]
        largest = max(energies)
        weights = [math.exp(e - largest) for e in energies]
        for i in range(channels):
            out[image, j] += weights[i] / sum(weights) * a[image, i]
    return gamma * out + a


@torch.no_grad()
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_pam_is_equations_3_and_4(pool: int) -> None:
    pam = PositionAttention(6, pool).eval()
    pam.eta.fill_(0.7)
    x = features(2, 6, 8, 4)
    expected = naive_pam(pam, x)
    for mode in ("fused", "plain"):
        pam.mode = mode
        torch.testing.assert_close(pam(x), expected)
    assert (expected - x).abs().max() > 0.05


@pytest.mark.parametrize("form", ["eq1", "danet"])
@torch.no_grad()
def test_cam_is_equations_1_and_2(form: CamForm) -> None:
    cam = ChannelAttention(form)
    cam.gamma.fill_(0.6)
    x = 0.5 * features(2, 5, 3, 4)
    expected = naive_cam(x, 0.6, form)
    torch.testing.assert_close(cam(x), expected)
    assert (expected - x).abs().max() > 0.05


@torch.no_grad()
def test_cam_forms_differ_as_said() -> None:
    """Eq. 1 copies the loudest channel over the others; DANet's form looks away from it."""
    x = torch.ones(1, 3, 8, 8) * torch.tensor([1.0, 2.0, 9.0])[:, None, None]
    for form, looked_at in (("eq1", 9.0), ("danet", 1.0)):
        cam = ChannelAttention(form)  # type: ignore[arg-type]
        cam.gamma.fill_(1.0)
        torch.testing.assert_close(cam(x) - x, torch.full_like(x, looked_at))


@torch.no_grad()
def test_cam_energies_are_float32_under_autocast() -> None:
    """A sum over 4096 positions is far beyond what bfloat16 can tell apart."""
    cam = ChannelAttention("eq1")
    cam.gamma.fill_(1.0)
    x = features(1, 4, 64, 64)
    x[:, 1] = x[:, 0] * 1.001  # energies of about 2000 that differ by 2
    expected = cam(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cam(x), expected)


def test_pooled_attention_has_the_gradients_of_its_plain_form() -> None:
    pam = PositionAttention(4, 2)
    nn.init.constant_(pam.eta, 0.5)
    x = features(2, 4, 4, 4).requires_grad_()
    gradients = []
    for mode in ("fused", "plain"):
        pam.mode = mode
        pam.zero_grad()
        (inputs,) = torch.autograd.grad(pam(x).square().sum(), x, retain_graph=True)
        pam(x).square().sum().backward()
        gradients.append([inputs, *(p.grad for p in pam.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 1 + sum(1 for _ in pam.parameters())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_positions_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6×4 positions do not divide into averages over 4×4"):
        PositionAttention(4, 4)(features(1, 4, 4, 6))


@pytest.mark.parametrize("mode", ["fused", "plain", "asleep"])
def test_attention_is_the_identity_at_first(mode: Literal["fused", "plain", "asleep"]) -> None:
    x = features(2, 4, 6, 6)
    pam = PositionAttention(4)
    pam.mode = mode
    assert torch.equal(pam(x), x)
    for form in ("eq1", "danet"):
        assert torch.equal(ChannelAttention(form)(x), x)


def test_pam_forms_have_the_same_gradient() -> None:
    x = features(2, 6, 5, 4)
    gradients = []
    pam = PositionAttention(6)
    nn.init.constant_(pam.eta, 0.5)
    for mode in ("fused", "plain"):
        twin = copy.deepcopy(pam)
        twin.mode = mode
        twin(x).square().sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_batch_norm_is_torchs_in_one_process() -> None:
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3, eps=1e-3)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_factorised_layer_is_equations_5_and_6() -> None:
    layer = FactorisedLayer(3, dilation=2).eval()
    x = torch.randn(1, 3, 9, 9)

    def convolve(conv: nn.Conv2d, x: Tensor, step_y: int, step_x: int) -> Tensor:
        padded = F.pad(x, (2, 2, 2, 2))
        out = conv.bias.reshape(1, -1, 1, 1).repeat(1, 1, 9, 9)  # type: ignore[union-attr]
        for tap in range(3):
            weight = conv.weight.flatten(2)[:, :, tap]
            y0, x0 = 2 + (tap - 1) * step_y, 2 + (tap - 1) * step_x
            shifted = padded[:, :, y0 : y0 + 9, x0 : x0 + 9]
            out = out + torch.einsum("oi,nihw->nohw", weight, shifted)
        return out

    y = convolve(layer.vertical, x, 1, 0).relu()
    y = layer.norm(convolve(layer.horizontal, y, 0, 1)).relu()
    y = convolve(layer.dilated_vertical, y, 2, 0).relu()
    y = layer.dilated_norm(convolve(layer.dilated_horizontal, y, 0, 2))
    torch.testing.assert_close(layer(x), (y + x).relu())


@torch.no_grad()
def test_down_sampler_pools_beside_its_convolution() -> None:
    down = DownSampler(2, 5, pam=False).eval()
    x = torch.randn(1, 2, 8, 8)
    joined = torch.cat([down.conv(x), F.max_pool2d(x, 2)], 1)
    assert joined.shape == (1, 5, 4, 4)
    torch.testing.assert_close(down(x), down.norm(joined).relu())


@torch.no_grad()
def test_up_sampler_doubles_the_sides() -> None:
    assert UpSampler(5, 3, pam=True)(torch.randn(2, 5, 4, 6)).shape == (2, 3, 8, 12)


@torch.no_grad()
def test_multiscale_block_averages_four_scales() -> None:
    block = MultiscaleBlock(4, "danet", (1, 2, 4, 8)).eval()
    x = torch.rand(1, 3, 16, 16)
    maps = [
        F.interpolate(
            branch(F.interpolate(x, scale_factor=1 / s, mode="area")), 16, mode="bilinear"
        )
        for s, branch in zip((1, 2, 4, 8), block.branches, strict=True)
    ]
    torch.testing.assert_close(block(x), sum(maps) / 4)
    assert len(MultiscaleBlock(4, None, (1,)).branches) == 1


def test_fcm_without_cam_is_the_layer_alone() -> None:
    kinds = [type(m) for m in factorised_attention(4, "eq1")]
    assert kinds == [FactorisedLayer, ChannelAttention]
    assert [type(m) for m in factorised_attention(4, None)] == [FactorisedLayer]


def test_dropout_drops_whole_channels_while_training_only() -> None:
    layer = FactorisedLayer(8, dropout=0.5)
    x = torch.rand(2, 8, 4, 4)  # positive, so that a dropped channel passes unchanged
    dropped = (layer(x) == x).flatten(2).all(-1)
    assert dropped.any() and not dropped.all()
    assert not (layer.eval()(x) == x).flatten(2).all(-1).any()
