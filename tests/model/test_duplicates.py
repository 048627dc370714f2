"""Photos that are in a set twice are held out together."""

import dataclasses
from pathlib import Path

from PIL import Image

from model.config import DataConfig
from model.data import find_samples
from model.train import split_samples
from tests.lesions import lesion_photo
from tests.model.tiny import tiny_config


def test_copies_share_a_fold(tmp_path: Path) -> None:
    for index in range(12):
        photo = lesion_photo(index, 80, 60)
        picture = Image.fromarray(photo.pixels)
        for copy, quality in (("", 95), ("_again", 95), ("_small", 80)):
            shown = picture.resize((160, 120)) if copy == "_small" else picture
            shown.save(tmp_path / f"{index}{copy}.jpg", quality=quality)
            mask = Image.fromarray(photo.mask).resize(shown.size)
            mask.save(tmp_path / f"{index}{copy}_segmentation.png")
    samples = find_samples(tmp_path)
    for fold in range(3):
        config = dataclasses.replace(tiny_config(), data=DataConfig(folds=3, fold=fold))
        kept, selections = split_samples(config, samples)
        lesions = [{s.id.split("_")[0] for s in part} for part in (kept, selections["holdout"])]
        assert not lesions[0] & lesions[1]
        assert len(lesions[0] | lesions[1]) == 12
        assert len(kept) + len(selections["holdout"]) == 36
