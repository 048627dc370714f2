"""The network as a whole: size, shapes, switches, and what its files say when they do not fit."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.config import GeneratorConfig
from model.generator import Generator, load_generator, load_metadata, save_generator
from model.layers import ChannelAttention, FactorisedLayer, PositionAttention
from model.teacher import Teacher
from tests.support.tiny import GENERATOR

TINY = GeneratorConfig(**GENERATOR)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def wake(generator: Generator, strength: float = 0.3) -> None:
    """Give the attentions a say, as training does."""
    for module in generator.modules():
        if isinstance(module, PositionAttention):
            nn.init.constant_(module.eta, strength)
        elif isinstance(module, ChannelAttention):
            nn.init.constant_(module.gamma, strength)


def test_it_is_the_papers_size() -> None:
    generator = Generator()
    assert parameters(generator) == 2_347_900
    stages = {name: parameters(stage) for name, stage in generator.named_children()}
    assert stages == {
        "multiscale": 1_924,
        "down1": 5_745,
        "down2": 22_241,
        "encoder1": 198_660,
        "down3": 87_489,
        "encoder2": 1_581_064,
        "bridge": 197_632,
        "bridge_cam": 1,
        "bridge_pam": 50_305,
        "decoder1": 86_785 + 99_330,
        "decoder2": 10_177 + 6_402,
        "head": 145,
    }


@pytest.mark.parametrize("size", [64, 128, 256])
@torch.inference_mode()
def test_logits_have_the_images_size(size: int) -> None:
    generator = Generator().eval()
    shapes = {}
    for name, stage in generator.named_children():
        stage.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    assert generator(torch.rand(1, 3, size, size)).shape == (1, 1, size, size)
    assert shapes["multiscale"] == (16, size, size)
    assert shapes["down1"] == (32, size // 2, size // 2)
    assert shapes["encoder1"] == (64, size // 4, size // 4)
    assert shapes["bridge_pam"] == (128, size // 8, size // 8)
    assert shapes["decoder1"] == (64, size // 4, size // 4)
    assert shapes["decoder2"] == (16, size // 2, size // 2)


@torch.inference_mode()
def test_sides_may_differ() -> None:
    assert Generator(TINY)(torch.rand(2, 3, 24, 40)).shape == (2, 1, 24, 40)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 32, 32), r"expected images \[n, 3, H, W\], got \[3, 32, 32\]"),
        ((1, 4, 32, 32), r"expected images \[n, 3, H, W\]"),
        ((1, 3, 32, 36), r"image is 36×32; both sides must be multiples of 8"),
    ],
)
def test_shape_errors_name_the_fix(shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Generator(TINY)(torch.rand(shape))


@torch.inference_mode()
def test_attention_changes_nothing_until_trained() -> None:
    torch.manual_seed(0)
    generator = Generator(replace(TINY, multiscale=False)).eval()
    bare = Generator(replace(TINY, multiscale=False, pam=False, cam=False)).eval()
    # an FCM without CAM has its layer at the same place, so that the names agree
    missing, extra = bare.load_state_dict(generator.state_dict(), strict=False)
    assert not missing and all("pam" in k or "gamma" in k for k in extra)
    x = torch.rand(2, 3, 32, 32)
    # CAM ∥ PAM are summed, so that two identities double what reaches the decoder
    bare.bridge.register_forward_hook(lambda _, __, out: 2 * out)
    torch.testing.assert_close(generator(x), bare(x))


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    generator = Generator()
    wake(generator)
    generator(torch.rand(2, 3, 32, 32)).square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # a convolution's bias is subtracted again by the norm after it: its gradient is rounding
        assert parameter.grad.any() or name.endswith("bias"), name


@torch.inference_mode()
def test_modes_compute_the_same() -> None:
    torch.manual_seed(0)
    generator = Generator(TINY).eval()
    wake(generator)
    x = torch.rand(2, 3, 32, 32)
    found = {}
    for mode in ("fused", "plain"):
        for module in generator.modules():
            if isinstance(module, PositionAttention):
                module.mode = mode
        found[mode] = generator(x)
    torch.testing.assert_close(found["fused"], found["plain"], rtol=1e-4, atol=1e-5)
    # asleep is awake at η = 0, for the half-resolution PAMs alone
    for attention in generator.half_resolution_attention():
        attention.eta.zero_()
    awake = generator(x)
    for attention in generator.half_resolution_attention():
        attention.mode = "asleep"
    torch.testing.assert_close(generator(x), awake)


def test_half_resolution_attention_is_where_it_costs() -> None:
    generator = Generator()
    assert generator.half_resolution_attention() == [
        generator.down1.pam,
        generator.decoder2[0].pam,
    ]
    assert Generator(replace(TINY, pam=False)).half_resolution_attention() == []


@pytest.mark.parametrize(
    ("switch", "pams", "cams", "layers", "branches"),
    [
        ({}, 6, 4 + 4 + 8 + 1 + 4, 17, 4),
        ({"multiscale": False}, 6, 1 + 4 + 8 + 1 + 4, 17, 1),
        ({"pam": False}, 0, 21, 17, 4),
        ({"cam": False}, 6, 0, 17, 4),
        ({"multiscale": False, "pam": False, "cam": False}, 0, 0, 17, 1),
        ({"encoder_blocks": 2}, 6, 19, 15, 4),
        ({"dilations": (2, 4)}, 6, 15, 11, 4),
        ({"decoder_blocks": 1}, 6, 19, 15, 4),
    ],
)
def test_switches_change_what_they_say(
    switch: dict[str, Any], pams: int, cams: int, layers: int, branches: int
) -> None:
    generator = Generator(GeneratorConfig(**switch))
    counts = Counter(type(m) for m in generator.modules())
    found = counts[PositionAttention], counts[ChannelAttention], counts[FactorisedLayer]
    assert found == (pams, cams, layers)
    assert len(generator.multiscale.branches) == branches


def test_values_of_the_config_arrive() -> None:
    generator = Generator(
        replace(TINY, cam_form="eq1", encoder_dropout=(0.1, 0.2), decoder_dropout=0.3)
    )
    assert {m.form for m in generator.modules() if isinstance(m, ChannelAttention)} == {"eq1"}
    rates = [m.dropout.p for m in generator.modules() if isinstance(m, FactorisedLayer)]
    assert rates == [0.1, 0.2, 0.2, 0.3, 0.3]
    wide = Generator(GeneratorConfig(widths=(8, 24, 48, 96)))
    assert wide.head.in_channels == 8 and wide.bridge.norm.num_features == 96


def test_weights_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = Generator(TINY).eval()
    save_generator(generator, tmp_path / "a.safetensors", {"threshold": "0.5"})
    again = load_generator(tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 32, 32)
    assert not again.training and again.config == TINY
    assert torch.equal(again(x), generator(x))
    assert load_metadata(tmp_path / "a.safetensors")["threshold"] == "0.5"


def test_files_that_hold_no_generator_say_so(tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"torn\.safetensors is not a readable safetensors file"):
        load_generator(torn)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="holds no SLSNet generator"):
        load_generator(foreign)
    other = tmp_path / "other.safetensors"
    save_generator(Generator(TINY), other)
    config = load_metadata(other)["config"].replace("[4, 6, 8, 10]", "[4, 6, 8, 12]")
    save_file(Generator(TINY).state_dict(), other, {"config": config})
    with pytest.raises(ValueError, match=r"other\.safetensors holds weights of another archit"):
        load_generator(other)


@torch.inference_mode()
def test_teacher_has_the_generators_interface() -> None:
    teacher = Teacher().eval()
    assert parameters(teacher) > 5 * 2_347_900
    assert teacher(torch.rand(1, 3, 64, 32)).shape == (1, 1, 64, 32)
