"""What is served is what is evaluated: the same masks, by the same figures."""

from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from model.data import find_pairs
from model.evaluate import evaluate, load_network
from tests.support import MODEL
from tests.support.answers import read_png
from tests.support.launch import ServerProcess
from tests.support.lesions import write_pairs


@pytest.mark.slow
def test_served_masks_score_as_evaluated(
    server: ServerProcess, data_dir: Path | None, tmp_path: Path
) -> None:
    folder = tmp_path
    if data_dir is None:
        write_pairs(folder, 8, 1022, 767)
    else:
        folder = data_dir / "native"
    pairs = find_pairs(folder, folder)
    jaccards = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path in sorted(folder.glob("*.jpg")):
            response = client.post("/segment", files={"file": path.read_bytes()})
            mask = read_png(response.raise_for_status().content)
            with Image.open(path.with_name(f"{path.stem}_segmentation.png")) as image:
                truth = np.asarray(image.convert("L")) > 127
            assert mask.shape == truth.shape
            jaccards.append((mask & truth).sum() / max((mask | truth).sum(), 1))
    evaluated = evaluate(pairs, load_network(MODEL)).report()
    assert evaluated["count"] == len(jaccards)
    assert np.mean(jaccards) == pytest.approx(evaluated["jaccard"], abs=0.0005)
