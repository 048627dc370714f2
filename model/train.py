"""Train SLSNet.

    python -m model.train --data ../shared/data --out runs/best             # the shipped recipe
    python -m model.train --preset paper --out runs/paper --set epochs=100  # the paper's, as a GAN
    python -m model.train --out runs/best --resume                          # after a kill
    torchrun --nproc-per-node 4 -m model.train --out runs/best              # data-parallel

A run's folder holds `config.yaml`, `last.pt` (all state, written atomically), `best.safetensors`
(the weights with the best selection Jaccard), `history.csv` and TensorBoard's events. All random
numbers follow from the seed and the step: a resumed run takes exactly the steps that it would have
taken.
"""

import argparse
import os
from pathlib import Path

import model.training_tools  # noqa: F401, before what it looks for

# isort: split
import torch
import torch.distributed as dist

from common.program import Help, program
from model.config import (
    PRESETS,
    ConfigError,
    add_set_argument,
    load_config,
    parse_config,
    parse_overrides,
    read_values,
)
from model.data import add_data_arguments
from model.loop import train
from model.names import add_network_argument
from model.trainer import RunProgress, TrainingError
from model.truth import DataError


def main(argv: list[str] | None = None) -> None:
    """Train, or go on with a run."""
    parser = argparse.ArgumentParser(
        prog=program("model.train"),
        description=__doc__,
        formatter_class=Help,
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    presets = ", ".join(PRESETS)
    parser.add_argument("--preset", help=f"the recipe (default: best): one of {presets}")
    parser.add_argument("--config", type=Path, help="YAML file of changes to the preset")
    add_network_argument(parser, "to train (default: the preset's)")
    add_set_argument(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    args = parser.parse_args(argv)
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        progress = _run(args)
    except (ConfigError, DataError, TrainingError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        hint = "; --resume goes on with the run" if (args.out / "last.pt").exists() else ""
        parser.exit(130, f"interrupted{hint}\n")
    finally:
        if world > 1:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"best selection Jaccard {progress.best:.4f} at epoch {progress.best_epoch}")


def _run(args: argparse.Namespace) -> RunProgress:
    if args.resume:
        saved = args.out / "config.yaml"
        if not saved.exists():
            raise TrainingError(
                f"nothing to resume: {saved} does not exist; start the run without --resume"
            )
        if args.preset or args.config or args.set or args.network:
            raise ConfigError(
                f"--resume takes the run's own {saved}: leave --preset, --config, --set and "
                "--network out, or start another run"
            )
        values = read_values(saved)
        try:
            config = parse_config(values)
        except ConfigError as error:
            raise ConfigError(f"{saved}: {error}") from error
    else:
        named = {"network": args.network} if args.network else {}
        changes = {**named, **parse_overrides(args.set)}
        config = load_config(args.preset or "best", args.config, changes)
    return train(config, args.data, args.out, args.cache, resume=args.resume)


if __name__ == "__main__":
    main()
