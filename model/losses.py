"""The paper's losses (eqs. 7, 9 and 11), pixel-wise cross-entropy, and those of other networks.

Probabilities, logits and ground truth are [n, 1, H, W]; every loss is a mean over images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def jaccard_loss(probability: Tensor, truth: Tensor) -> Tensor:
    """The loss of eq. 9, per image: `1 - Σgp / (Σg² + Σp² - Σgp)`.

    Where truth and prediction are both empty the ratio is 0/0. Nothing is missed: the loss is 0.
    """
    p, g = probability.flatten(1), truth.flatten(1)
    intersection = (g * p).sum(1)
    union = g.square().sum(1) + p.square().sum(1) - intersection
    tiny = torch.finfo(p.dtype).tiny
    ratio = torch.where(union > tiny, intersection / union.clamp_min(tiny), torch.ones_like(union))
    return (1 - ratio).mean()


def l1_loss(probability: Tensor, truth: Tensor) -> Tensor:
    """The second term of eq. 7: the mean absolute difference."""
    return F.l1_loss(probability, truth)


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The first term of eq. 7: `-log D(x, G(x, z))`, averaged over D's map."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The loss of eq. 11: `-log D(x, y) - log(1 - D(x, G(x, z)))`, averaged over D's map."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Pixel-wise binary cross-entropy; the target may be soft (a teacher's probability)."""
    return F.binary_cross_entropy_with_logits(logits, target)


def endpoint_error(probability: Tensor, target: Tensor) -> Tensor:
    """SLSDeep's second term: the length of the difference of two masks' gradients, averaged."""
    difference = probability - target
    across = difference[..., :-1, 1:] - difference[..., :-1, :-1]
    down = difference[..., 1:, :-1] - difference[..., :-1, :-1]
    # The root has no gradient at 0.
    return (across.square() + down.square() + 1e-12).sqrt().mean()
