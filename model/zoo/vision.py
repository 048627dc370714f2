"""torchvision, with any build of torch. What uses it, or is built on it, imports this first.

torchvision's own operators are compiled for one build of torch. Beside another (the registry's
wheel is built for CUDA, torch may be built for the CPU alone) they do not load, and importing it
fails: it describes operators that are not there. Networks need none of them. Detectors need one,
the suppression of overlapping boxes, which is given here in torch.
"""

import torch
from torch import Tensor

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [n, 4] that overlap no better one by more than the threshold."""
    corners = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    sides = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - corners
    common = sides.clamp_min(0).prod(-1)  # [n, n]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = common / (area[:, None] + area[None] - common) > iou_threshold
    order = scores.argsort(descending=True, stable=True)
    left = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for index in order.tolist():
        if left[index]:
            kept.append(index)
            left &= ~overlaps[index]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for operator in _OPERATORS:
        torch.library.define(f"torchvision::{operator}", _SCHEMA)
    torch.library.impl("torchvision::nms", "default", _suppress)
    import torchvision

__all__ = ["torchvision"]
