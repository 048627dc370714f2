"""Augmentation: seeded, the same however a batch is shared out, masks with their images."""

import pytest
import torch
from torch import Tensor

from model.augment import Augmenter, Recipe
from tests.support.tiny import pixel_set

RECIPES: tuple[Recipe, ...] = ("none", "paper", "strong", "settle")
CPU = torch.device("cpu")


def batch(count: int = 6, side: int = 64) -> tuple[Tensor, Tensor]:
    pixels = pixel_set(count, side)
    return torch.from_numpy(pixels.images), torch.from_numpy(pixels.masks)


@pytest.mark.parametrize("recipe", RECIPES)
def test_batches_are_in_range_and_in_shape(recipe: Recipe) -> None:
    images, masks = batch()
    for seed in range(5):
        x, y = Augmenter(recipe, 32, 64, CPU)(images, masks, seed)
        assert x.shape == (6, 3, 32, 32) and y.shape == (6, 1, 32, 32)
        assert x.dtype == y.dtype == torch.float32
        for values in (x, y):
            assert values.isfinite().all() and values.min() >= 0 and values.max() <= 1
        assert 0.02 < y.mean() < 0.9


@pytest.mark.parametrize("recipe", ["paper", "strong", "settle"])
def test_same_seed_gives_the_same_batch(recipe: Recipe) -> None:
    images, masks = batch()
    x, y = Augmenter(recipe, 32, 64, CPU)(images, masks, 7)
    torch.manual_seed(99)  # nothing but the seed counts
    again, mask = Augmenter(recipe, 32, 64, CPU)(images, masks, 7)
    assert torch.equal(x, again) and torch.equal(y, mask)
    other, _ = Augmenter(recipe, 32, 64, CPU)(images, masks, 8)
    assert (x - other).abs().mean() > 0.01


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_are_slices_of_the_global_batch(recipe: Recipe) -> None:
    images, masks = batch()
    augmenter = Augmenter(recipe, 32, 64, CPU)
    x, y = augmenter(images, masks, 3)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        mine, mask = augmenter(images[part], masks[part], 3, part, 6)
        torch.testing.assert_close(mine, x[part])
        torch.testing.assert_close(mask, y[part])


def test_recipe_none_only_pools() -> None:
    images, masks = batch()
    x, y = Augmenter("none", 32, 64, CPU)(images, masks, 0)
    pooled = images.float().reshape(6, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    torch.testing.assert_close(x, pooled)
    assert (y > 0).any() and y.max() == 1


def telling(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Pictures that show their mask: dark lesion on bright skin, a different shape in each."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    masks = torch.stack(
        [
            ((rows - side * (0.3 + 0.05 * i)).abs() < side * 0.2)
            & ((columns - side * (0.6 - 0.04 * i)).abs() < side * 0.12)
            for i in range(count)
        ]
    )[:, None]
    images = torch.where(masks, 60, 200).expand(-1, 3, -1, -1)
    return images.byte(), masks.byte() * 255


@pytest.mark.parametrize("recipe", ["paper", "strong"])
def test_masks_stay_with_their_images(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = telling(8, 128)
    augmenter = Augmenter(recipe, 64, 128, CPU)
    if recipe == "strong":
        # hair and the tube's dark surround hide the picture's message: look at the warp alone
        monkeypatch.setattr(augmenter, "artefacts", lambda x, y, _: (x, y))
    agreements, moved = [], []
    for seed in range(3):
        x, y = augmenter(images, masks, seed)
        for picture, mask in zip(x.mean(1), y[:, 0] > 0.5, strict=True):
            middle = (picture.quantile(0.02) + picture.quantile(0.9)) / 2
            dark = picture < middle
            agreements.append(float((dark & mask).sum() / (dark | mask).sum()))
        pooled = masks.float().reshape(8, 1, 64, 2, 64, 2).mean((3, 5)) / 255
        moved.append(float((y - pooled).abs().mean()))
    assert min(agreements) > 0.6 and sum(agreements) / len(agreements) > 0.9
    assert min(moved) > 0.02


def test_several_targets_are_warped_alike() -> None:
    images, masks = batch()
    x, y = Augmenter("strong", 32, 64, CPU)(images, torch.cat([masks, masks], 1), 5)
    assert y.shape[1] == 2 and torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(x, Augmenter("strong", 32, 64, CPU)(images, masks, 5)[0])


def test_papers_recipe_flips_gammas_and_equalises() -> None:
    images, masks = batch(8)
    x, y = Augmenter("paper", 64, 64, CPU)(images, masks, 1)
    plain = masks.float() / 255
    kinds = set()
    for i in range(8):
        views = {
            (v, h): plain[i].flip([a for a, on in ((1, v), (2, h)) if on])
            for v in (False, True)
            for h in (False, True)
        }
        (kind,) = [k for k, view in views.items() if torch.equal(view, y[i])]  # a flip, exactly
        kinds.add(kind)
    assert len(kinds) > 1
    untouched = [
        any(
            torch.equal(x[i], (images[i].float() / 255).flip(axes))
            for axes in ([], [1], [2], [1, 2])
        )
        for i in range(8)
    ]
    assert not all(untouched)


def test_settle_varies_most_images_little_and_the_rest_strongly() -> None:
    images, masks = batch(40)
    x, y = Augmenter("settle", 64, 64, CPU)(images, masks, 4)
    strong, _ = Augmenter("strong", 64, 64, CPU)(images, masks, 4)
    plain = 0
    for i in range(40):
        if torch.equal(x[i], strong[i]):
            continue
        plain += 1
        ((original, mask),) = [
            ((images[i].float() / 255).flip(axes), (masks[i].float() / 255).flip(axes))
            for axes in ([], [1], [2], [1, 2])
            if torch.equal((masks[i].float() / 255).flip(axes), y[i])
        ]
        assert torch.equal(mask, y[i])
        gamma = x[i].clamp(0.05, 0.95).log() / original.clamp(0.05, 0.95).log()
        assert 0.8 < gamma.median() < 1.25 and gamma.std() < 0.1
    assert 18 <= plain <= 30


def test_stored_images_must_pool_to_the_size() -> None:
    with pytest.raises(ValueError, match="stored images of 256 px do not pool to 96 px"):
        Augmenter("none", 96, 256, CPU)
