r"""Write soft targets: every image is judged by networks that were not trained on it.

    for f in 0 1 2 3 4; do python -m model.train --out runs/t$f --set network=teacher \
        --set data.folds=5 --set data.fold=$f; done
    python -m model.distill --runs runs/t? --out runs/teacher.npz
    python -m model.train --out runs/best --set data.teacher=runs/teacher.npz --set loss.teacher=0.5

Each run held out one fold of the training ids; each image is judged only by the runs that held it
out, so that its target says where annotators and networks agree rather than what a network has
memorised. Predictions are averaged over the eight symmetries of the square. (Hinton et al. 2015.)
"""

import argparse
import sys
from pathlib import Path

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import replacing
from common.program import Help
from model.checkpoint import load_run, split_again
from model.config import ConfigError
from model.data import add_data_arguments, add_held_out_argument, find_samples, load_pixels, select
from model.metrics import jaccard
from model.scoring import confusion
from model.splits import STORED_SIZE
from model.truth import DataError
from photos.image import MODEL_SIZE


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, size: int, side: int) -> Tensor:
    """Predict probabilities, averaged over flips and quarter turns.

    Args:
        network: images in [0, 1] → logits.
        images: uint8 [n, 3, stored, stored].
        size: side of the network's input, pixels.
        side: side of the result, pixels.

    Returns:
        float32 [n, side, side].
    """
    x = F.interpolate(images.float() / 255, size=size, mode="area")
    total = torch.zeros(len(x), 1, size, size, device=x.device)
    for turns in range(4):
        for flip in (False, True):
            view = torch.rot90(x, turns, (2, 3))
            view = view.flip(3) if flip else view
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                found = network(view).float().sigmoid()
            found = found.flip(3) if flip else found
            total += torch.rot90(found, -turns, (2, 3))
    mean = total / 8
    return F.interpolate(mean, size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def main(argv: list[str] | None = None) -> None:
    """Judge every image, and write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m model.distill",
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    add_held_out_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the soft targets, .npz"
    )
    args = parser.parse_args(argv)
    try:
        distil(args.data, args.runs, args.out, args.cache)
    except (ConfigError, DataError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def distil(data: Path, runs: list[Path], out: Path, cache: Path) -> None:
    """Write held-out probabilities of all training ids.

    The file holds `ids`, `probability` (uint8 [n, 128, 128], of 0 to 255) and `seen`, the ids that
    any of the runs was trained on.

    Raises:
        ConfigError: a run is unfinished or held nothing out, or was trained on what it holds out
            today, or no run held out some id.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = find_samples(data)
    loaded = [load_run(run, device) for run in runs]
    uniform = any(run.config.data.allow_uniform_masks for run in loaded)
    pixels = load_pixels(select(samples, "training"), STORED_SIZE, cache, uniform)
    row = {name: i for i, name in enumerate(pixels.ids)}
    total = np.zeros((len(row), STORED_SIZE, STORED_SIZE), np.float32)
    votes = np.zeros(len(row), np.int64)
    used: set[str] = set()  # copies of validation and test photos are left out
    for run in loaded:
        kept, held = split_again(run, samples, cache)
        if "holdout" not in held:
            raise ConfigError(f"{run.folder} held nothing out: train it with data.folds")
        used |= {s.id for s in (*kept, *held["holdout"])}
        rows = np.array([row[s.id] for s in held["holdout"]])
        scores = []
        for chunk in np.array_split(rows, max(1, len(rows) // 64)):
            images = torch.from_numpy(pixels.images[chunk]).to(device)
            found = predict(run.network, images, run.config.size, STORED_SIZE).cpu().numpy()
            total[chunk] += found
            scores += jaccard(confusion(found, pixels.masks[chunk, 0])).tolist()
        votes[rows] += 1
        mean = f"Jaccard {np.mean(scores):.4f}"
        print(f"{run.folder}: {len(rows)} held-out images, {mean}", file=sys.stderr)
    chosen = [i for name, i in row.items() if name in used]
    if missing := [pixels.ids[i] for i in chosen if not votes[i]]:
        raise ConfigError(f"{missing[0]} was held out by no run: train every fold")
    means = total[chosen] / votes[chosen, None, None]
    score = jaccard(confusion(means, pixels.masks[chosen, 0])).mean()
    print(f"ensemble, held out: Jaccard {score:.4f}", file=sys.stderr)
    factor = STORED_SIZE // MODEL_SIZE
    small = means.reshape(len(means), MODEL_SIZE, factor, MODEL_SIZE, factor).mean((2, 4))
    # To an open file: to a path without .npz, numpy would add that.
    with replacing(out) as path, path.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.array([pixels.ids[i] for i in chosen]),
            probability=np.rint(small * 255).astype(np.uint8),
            seen=np.array(sorted(frozenset[str]().union(*(run.ids for run in loaded)))),
        )


if __name__ == "__main__":
    main()
