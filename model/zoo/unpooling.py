"""Pooling that remembers where each maximum was, and the unpooling that puts values back there.

`torch.nn.MaxUnpool2d` computes the same, but neither torch's exporter nor TensorRT has it. These
are slices, comparisons and a pixel shuffle, which every runtime has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Take the maximum of every 2×2 window.

    Args:
        x: [n, C, H, W], with even sides.

    Returns:
        The maxima [n, C, H/2, W/2], and a mask [n, C, 4, H/2, W/2] with one True in each window:
        the first position, row by row, that has the maximum.
    """
    top = F.max_pool2d(x, 2)
    free = torch.ones_like(top, dtype=torch.bool)
    places = []
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = free & (x[..., row::2, column::2] == top)
        free = free & ~here
        places.append(here)
    return top, torch.stack(places, 2)


def max_unpool(x: Tensor, places: Tensor) -> Tensor:
    """Put each value where the maximum of its window was, and 0 elsewhere.

    Args:
        x: [n, C, H/2, W/2].
        places: as `max_pool` returned it.

    Returns:
        [n, C, H, W].
    """
    spread = x.unsqueeze(2) * places.to(x.dtype)  # [n, C, 4, H/2, W/2]
    return F.pixel_shuffle(spread.flatten(1, 2), 2)
