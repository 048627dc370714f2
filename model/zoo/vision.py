"""torchvision, with any build of torch. What uses it, or is built on it, imports this first.

torchvision's own operators are compiled for one build of torch. Beside another (the registry's
wheel is built for CUDA, torch may be built for the CPU alone) they do not load, and importing it
fails: it describes operators that are not there. Networks need none of them. Detectors need two,
the suppression of overlapping boxes and the crop of a box, which are given here in torch.
"""

from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
}


def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [n, 4] that overlap no better one by more than the threshold."""
    corners = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    sides = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corners
    common = sides.clamp_min(0).prod(-1)  # [n, n]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    apart = (common / (area[:, None] + area[None] - common) <= iou_threshold).cpu().numpy()
    left = np.ones(len(boxes), bool)
    kept = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if left[index]:
            kept.append(index)
            left &= apart[index]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def _crop(
    maps: Tensor,
    boxes: Tensor,
    scale: float,
    height: int,
    width: int,
    samples: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign: what lies in boxes (index of the map, x, y, x, y), [k, channels, height, width].

    Where `samples` a side is not positive, there are two; torchvision takes more in a large box.
    """
    samples = samples if samples > 0 else 2
    corners = boxes[:, 1:] * scale - 0.5 * aligned
    sides = corners[:, 2:] - corners[:, :2]
    sides = sides if aligned else sides.clamp_min(1)
    last = torch.tensor([maps.shape[3] - 1, maps.shape[2] - 1], device=maps.device).clamp_min(1)

    def places(axis: int, count: int) -> Tensor:
        steps = (torch.arange(count * samples, device=maps.device) + 0.5) / (count * samples)
        there = corners[:, axis, None] + sides[:, axis, None] * steps
        return there * (2 / last[axis]) - 1

    x, y = places(0, width), places(1, height)
    shape = (len(boxes), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], -1).to(maps.dtype)
    found = maps.new_empty((len(boxes), maps.shape[1], height, width))
    for index in range(len(maps)):
        rows = torch.nonzero(boxes[:, 0] == index)[:, 0]
        if len(rows):
            tall = grid[rows].reshape(1, -1, shape[2], 2)  # one box above another
            taken = F.grid_sample(
                maps[index : index + 1], tall, padding_mode="border", align_corners=True
            )
            means = F.avg_pool2d(taken, samples).view(maps.shape[1], len(rows), height, width)
            found = found.index_copy(0, rows, means.transpose(0, 1))
    return found


try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for operator, schema in _OPERATORS.items():
        torch.library.define(f"torchvision::{operator}", schema)
    torch.library.impl("torchvision::nms", "default", _suppress)
    torch.library.impl("torchvision::roi_align", "CompositeImplicitAutograd", _crop)
    import torchvision

    # Its functions ask whether the operators are there, and both modules have the question.
    for module in ("torchvision.extension", "torchvision.ops.roi_align"):
        vars(import_module(module))["_has_ops"] = lambda: True

__all__ = ["torchvision"]
