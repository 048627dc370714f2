"""Every loss on cases worked out by hand; gradients against eq. 10 and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from model.losses import (
    adversarial_loss,
    bce_loss,
    discriminator_loss,
    endpoint_error,
    jaccard_loss,
    l1_loss,
)


def image(*values: float) -> Tensor:
    """One image of 1 × n pixels, [1, 1, 1, n]."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ((1, 1, 0, 0), (1, 1, 0, 0), 0),  # perfect
        ((0, 0, 1, 1), (1, 1, 0, 0), 1),  # nothing in common
        ((1, 1, 1, 0), (1, 1, 0, 0), 1 - 2 / 3),  # one too many
        ((1, 0, 0, 0), (1, 1, 0, 0), 1 - 1 / 2),  # one missed
        ((0.5, 0.5, 0.5, 0.5), (1, 1, 0, 0), 1 - 1 / (2 + 1 - 1)),  # undecided
        ((0, 0, 0, 0), (1, 1, 0, 0), 1),  # empty prediction
        ((0, 1, 0, 0), (0, 0, 0, 0), 1),  # empty truth, false alarm
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),  # both empty: nothing is missed
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),  # all lesion
    ],
)
def test_jaccard_by_hand(
    prediction: tuple[float, ...], truth: tuple[float, ...], expected: float
) -> None:
    assert float(jaccard_loss(image(*prediction), image(*truth))) == pytest.approx(expected)


def test_jaccard_is_a_mean_over_images_not_over_pixels() -> None:
    small = image(1, 0, 0, 0), image(1, 0, 0, 0)
    large = image(1, 1, 0, 0), image(1, 1, 1, 1)
    both = [torch.cat(pair) for pair in zip(small, large, strict=True)]
    assert float(jaccard_loss(both[0], both[1])) == pytest.approx((0 + 1 / 2) / 2)


def test_jaccard_gradient_is_equation_10() -> None:
    """With I = Σgp and U = Σg² + Σp² − I: dL/dp = −(g·U − I·(2p − g)) / U²."""
    torch.manual_seed(0)
    g = (torch.rand(1, 1, 3, 4, dtype=torch.float64) > 0.5).double()
    p = torch.rand(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    jaccard_loss(p, g).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        intersection = (g * p).sum()
        union = (g * g).sum() + (p * p).sum() - intersection
        expected = -(g * union - intersection * (2 * p - g)) / union**2
    torch.testing.assert_close(p.grad, expected)
    assert p.grad is not None
    assert (p.grad[g == 1] < 0).all()  # more probability inside the lesion lowers the loss
    assert (p.grad[g == 0] > 0).all()  # and raises it outside


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    p = torch.rand(2, 1, 3, 3, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    g = (torch.rand(2, 1, 3, 3, dtype=torch.float64) > 0.5).double()
    logits = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(2, 1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: jaccard_loss(p, g), p)
    assert torch.autograd.gradcheck(lambda p: jaccard_loss(p, soft), p)
    assert torch.autograd.gradcheck(lambda p: l1_loss(p, g), p)
    assert torch.autograd.gradcheck(lambda x: bce_loss(x, soft), logits)
    assert torch.autograd.gradcheck(adversarial_loss, logits)
    assert torch.autograd.gradcheck(discriminator_loss, (logits, logits.detach() + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_masks_give_finite_gradients(dtype: torch.dtype) -> None:
    truth = torch.zeros(2, 1, 4, 4, dtype=dtype)
    prediction = torch.zeros(2, 1, 4, 4, dtype=dtype, requires_grad=True)
    jaccard_loss(prediction, truth).backward()  # type: ignore[no-untyped-call]
    assert prediction.grad is not None and not prediction.grad.any()
    found = torch.full((2, 1, 4, 4), 1e-3, dtype=dtype, requires_grad=True)
    loss = jaccard_loss(found, truth)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 1 and found.grad is not None and found.grad.isfinite().all()


def test_l1_by_hand() -> None:
    assert float(l1_loss(image(0.5, 1, 0, 0.25), image(1, 1, 0, 1))) == pytest.approx(1.25 / 4)


def test_bce_by_hand() -> None:
    # probabilities 3/4 and 1/2 for a lesion pixel and a soft one of 1/4
    loss = bce_loss(image(math.log(3), 0), image(1, 0.25))
    assert float(loss) == pytest.approx((-math.log(3 / 4) + math.log(2)) / 2)


def test_adversarial_loss_is_equation_7s_first_term() -> None:
    # D says 1/2 and 4/5 of the generator's masks
    logits = image(0, math.log(4))
    assert float(adversarial_loss(logits)) == pytest.approx(
        -(math.log(1 / 2) + math.log(4 / 5)) / 2
    )


def test_discriminator_loss_is_equation_11() -> None:
    # D says 4/5 of the annotator's and 1/4 of the generator's mask
    real, fake = image(math.log(4)), image(-math.log(3))
    expected = -math.log(4 / 5) - math.log(1 - 1 / 4)
    assert float(discriminator_loss(real, fake)) == pytest.approx(expected)


def test_losses_do_not_overflow_where_d_is_certain() -> None:
    certain = image(1000.0)
    assert float(adversarial_loss(-certain)) == pytest.approx(1000)
    assert float(adversarial_loss(certain)) == 0
    assert float(discriminator_loss(certain, -certain)) == 0


def test_the_end_point_error_is_of_gradients() -> None:
    truth = torch.zeros(1, 1, 3, 3)
    assert float(endpoint_error(truth + 0.3, truth)) == pytest.approx(0, abs=1e-5)
    corner = truth.clone()
    corner[0, 0, 0, 0] = 1
    # Both differences at the corner are 1, those of the three other places are 0.
    assert float(endpoint_error(corner, truth)) == pytest.approx(2**0.5 / 4, abs=1e-5)
