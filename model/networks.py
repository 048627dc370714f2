"""Every network that can be trained, by its name: built, saved and read.

`slsnet` is the project's own (`model.generator`), `teacher` is what it can be distilled from. The
others are those that it is compared with (`model.zoo`).
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from model import zoo
from model.config import ConfigError, TrainConfig
from model.generator import Generator, load_generator, load_metadata, save_generator
from model.names import check_name, name_of
from model.teacher import Teacher
from model.zoo.network import ZooNetwork


def check_network(config: TrainConfig) -> None:
    """Refuse, before the long part, what `new_network` would refuse.

    Raises:
        ConfigError: the network has no such option, or a library that it needs is missing.
    """
    if config.network in zoo.networks():
        try:
            zoo.check(config.network, **config.options)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def new_network(config: TrainConfig) -> nn.Module:
    """The network that `config` names, with fresh weights.

    Raises:
        ConfigError: as for `check_network`, or the value of an option does not fit.
    """
    if config.network == "slsnet":
        return Generator(config.generator)
    if config.network == "teacher":
        return Teacher()
    try:
        return zoo.build(config.network, **config.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{config.network} with {config.options}: {error}") from error


def save_network(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write weights to a safetensors file, with what `read_network` needs. A teacher's has none."""
    if isinstance(network, Generator):
        save_generator(network, path, metadata)
        return
    told = None
    if isinstance(network, ZooNetwork):
        told = {**metadata, "network": network.name, "options": json.dumps(network.options)}
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    save_file(state, path, told)


def read_network(path: Path, name: str | None = None) -> Generator | ZooNetwork:
    """Read a network written by :func:`save_network`, in evaluation mode.

    Args:
        path: safetensors file.
        name: the network that the caller wants; by default whatever the file holds.

    Raises:
        ValueError: the file holds no network, or another than `name`, or its weights fit another
            architecture; or a library that the network needs is missing.
    """
    metadata = load_metadata(path)
    said = name_of(metadata)
    check_name(path, said, name)
    if said == "slsnet":
        return load_generator(path)
    try:
        network = zoo.build(said, **json.loads(metadata.get("options", "{}")))
        network.load_state_dict(load_file(path))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds weights of another {said}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds a network that cannot be built: {error}") from error
    return network.eval()
