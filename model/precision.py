"""The arithmetic of a run: float32, or bf16 where the processor has it."""

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch

from model.config import TrainConfig


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether the processor computes in bf16 itself. Emulated bf16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    # Linux names them so, for x86 and for Arm.
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def chosen_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision on `device`: what `config` names; for `auto` the one that is faster there."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if has_bf16(device) else "fp32"


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network runs in the precision of `config`."""
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=chosen_precision(config, device) == "bf16",
        cache_enabled=False,  # a captured graph must own its casts
    )
