"""The synthetic photos are what tests elsewhere take them for."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.evaluate import WEIGHTS, load_network
from photos.image import lesion_mask, read_photo, unpack_mask
from tests.support.lesions import SKIN_TONES, drawn_photo, encode_photo, lesion_photo, write_pairs


def test_a_seed_is_a_scene() -> None:
    first, again, other = lesion_photo(3), lesion_photo(3), lesion_photo(4)
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.mask, other.mask)


@pytest.mark.parametrize(("width", "height"), [(600, 450), (450, 600), (64, 64), (1801, 1203)])
def test_any_size(width: int, height: int) -> None:
    photo = lesion_photo(0, width, height)
    assert photo.pixels.shape == (height, width, 3)
    assert photo.pixels.dtype == np.uint8
    assert photo.mask.shape == (height, width)
    assert photo.mask.dtype == np.bool_


@pytest.mark.parametrize("seed", range(12))
def test_the_scene_does_not_depend_on_the_size(seed: int) -> None:
    small, large = lesion_photo(seed, 300, 225).mask, lesion_photo(seed, 900, 675).mask
    shrunk = np.asarray(Image.fromarray(large).convert("L").resize((300, 225))) > 127
    assert (small & shrunk).sum() / (small | shrunk).sum() > 0.97


@pytest.mark.parametrize("tone", range(len(SKIN_TONES)))
def test_lesions_are_darker_than_their_skin_and_within_the_frame(tone: int) -> None:
    for seed in range(8):
        photo = lesion_photo(seed, 240, 180, tone=tone)
        assert 0.02 < photo.mask.mean() < 0.6
        assert not photo.mask[[0, -1]].any()
        # Beside the border, so that a black vignette does not count as skin.
        mask = Image.fromarray(photo.mask).convert("L")
        wider = mask.resize((60, 45), Image.Resampling.BOX).resize((240, 180))
        ring = (np.asarray(wider) > 0) & ~photo.mask
        green = photo.pixels[..., 1].astype(float)
        assert green[photo.mask].mean() < green[ring].mean()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_encoded_in_every_format(image_format: str) -> None:
    photo = lesion_photo(1, 320, 240)
    read = read_photo(encode_photo(photo.pixels, image_format))
    naive = Image.fromarray(photo.pixels).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(read.pixels.astype(int) - np.asarray(naive)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_reads_upright(orientation: int) -> None:
    photo = lesion_photo(2, 320, 240)
    turned = encode_photo(photo.pixels, "PNG", orientation=orientation)
    with Image.open(BytesIO(turned)) as image:
        assert (image.size == (320, 240)) == (orientation < 5)
    read = read_photo(turned)
    assert (read.width, read.height) == (320, 240)
    assert np.array_equal(read.pixels, read_photo(encode_photo(photo.pixels, "PNG")).pixels)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_encoded_in_other_modes(mode: str) -> None:
    data = drawn_photo(1, 320, 240, "PNG", mode=mode)
    with Image.open(BytesIO(data)) as image:
        assert image.mode == mode
    assert read_photo(data).width == 320


def test_pairs_on_disk_are_laid_out_like_a_challenge(tmp_path: Path) -> None:
    names = write_pairs(tmp_path, 2, 120, 90)
    assert names == ["lesion_000", "lesion_001"]
    with Image.open(tmp_path / "lesion_001_segmentation.png") as mask:
        assert mask.mode == "1"
        assert np.array_equal(np.asarray(mask), lesion_photo(1, 120, 90).mask)
    assert read_photo((tmp_path / "lesion_001.jpg").read_bytes()).height == 90


def test_the_shipped_network_finds_most_lesions() -> None:
    network = load_network(WEIGHTS)
    scenes = [lesion_photo(seed, 480, 360) for seed in range(24)]
    batch = np.stack([read_photo(encode_photo(scene.pixels)).pixels for scene in scenes])
    scores = []
    for scene, probability in zip(scenes, network.predict(batch), strict=True):
        mask = unpack_mask(lesion_mask(probability, 480, 360), 480)
        scores.append((mask & scene.mask).sum() / (mask | scene.mask).sum())
    assert np.mean(np.array(scores) > 0.65) >= 0.8  # found, by the challenge's own measure
    assert np.median(scores) > 0.8
