r"""One network of the mean weights of several runs that started from the same weights.

    for seed in 11 12; do python -m model.train --out runs/settle-$seed --set init=… \
        --set seed=$seed …; done
    python -m model.average --runs runs/settle-11 runs/settle-12 --out runs/settled.safetensors

Fine-tuned from one start, runs end in one valley of the loss: the mean of their weights costs no
more than one of them and is seldom worse than the best (Wortsman et al. 2022, "Model soups"). It
takes each run's averaged weights at its end, not those of its best epoch; of one run, it is these.
"""

import argparse
from pathlib import Path

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import torch
from torch import Tensor

from common.program import Help
from model.checkpoint import load_run, refuse_seen, weights_metadata, writing
from model.config import ConfigError
from model.data import add_data_arguments
from model.generator import Generator, save_generator
from model.scoring import score_selections
from model.splits import prepare
from model.trainer import TrainingError
from model.truth import DataError


def mean_network(generators: list[Generator]) -> Generator:
    """A generator whose weights and running statistics are the means of those of `generators`.

    Raises:
        ConfigError: the generators have different architectures.
    """
    first = generators[0]
    if any(generator.config != first.config for generator in generators):
        raise ConfigError("these runs are of different architectures: they have no mean")
    states = [generator.state_dict() for generator in generators]
    mean: dict[str, Tensor] = {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    network = Generator(first.config)
    network.load_state_dict(mean)
    return network.eval()


def average(runs: list[Path], data: Path, out: Path, cache: Path) -> dict[str, float]:
    """Write the mean of finished runs, with its score on the sets that the runs selected by.

    Args:
        runs: folders that `model.train` wrote.
        data: the folder of data sets that the runs used.
        out: the `.safetensors` file that is written.

    Returns:
        Jaccard and threshold Jaccard of every selection set.

    Raises:
        ConfigError: a run is unfinished or trains no generator, or it differs from the first in
            architecture, input size, split or photos, or was trained on what is held out today.
        DataError: a file or id cannot be used; the message names it.
        TrainingError: `out` cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = [load_run(run, device) for run in runs]
    first, config = loaded[0], loaded[0].config
    generators = []
    for run in loaded:
        if not isinstance(run.network, Generator):
            told = f"{run.folder} trained a {run.config.network}"
            raise ConfigError(f"{told}: only slsnet's weights are averaged")
        held = (run.config.data.folds, run.config.data.fold)
        if (run.config.size, *held) != (config.size, config.data.folds, config.data.fold):
            raise ConfigError(f"{run.folder} has another input size or other folds than {runs[0]}")
        if run.ids != first.ids:
            raise ConfigError(f"{run.folder} was trained on other photos than {runs[0]}")
        generators.append(run.network)
    network = mean_network(generators).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    _, selections, origin = prepare(config, data, cache)
    for photos in selections.values():
        refuse_seen(first.folder, first.ids, photos.ids)
    scores = score_selections(network, selections, config, device)
    with writing(out) as path:
        save_generator(network, path, weights_metadata(scores, origin, config.size))
    return scores


def main(argv: list[str] | None = None) -> None:
    """Average, score and write the weights."""
    parser = argparse.ArgumentParser(
        prog="python -m model.average",
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the weights, .safetensors"
    )
    args = parser.parse_args(argv)
    try:
        scores = average(args.runs, args.data, args.out, args.cache)
    except (ConfigError, DataError, TrainingError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for name, value in scores.items():
        if name != "selection":
            print(f"{name} {value:.4f}")


if __name__ == "__main__":
    main()
