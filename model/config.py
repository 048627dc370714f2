"""What is trained and how. Every choice that the paper leaves open or ablates is a frozen value.

Presets are named configurations. `load_config` refuses keys that do not exist. The default of a new
field does what was done without it, so that earlier runs can be resumed.
"""

import argparse
import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from model.augment import Recipe
from model.names import ZOO, Option

CamForm = Literal["danet", "eq1"]

_STRICT = ConfigDict(extra="forbid")

Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Dropout = Decay


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the fix."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The architecture of the generator (Sarker et al. 2019, section 3; 2,347,900 parameters).

    A field exists where the text is open or where tables 4 and 5 vary the network.
    """

    __pydantic_config__ = _STRICT

    multiscale: bool = True  # four input scales averaged (Table 4: "w/o MS" is False)
    pam: bool = True  # position attention after every down- and up-sampling (Table 4)
    # At 1/2 and at 1/4 resolution: keys and values of the position attention are averaged over so
    # many positions a side (`model.layers.PositionAttention`); 1 is the paper's eqs. 3 and 4.
    pam_pool: tuple[int, int] = (1, 1)
    cam: bool = True  # channel attention after every factorised layer (Table 4)
    cam_form: CamForm = "danet"  # eq. 1 saturates to an arg-max; see docs/training.md
    # at the stem, and at 1/2, 1/4 and 1/8 resolution
    widths: tuple[Width, Width, Width, Width] = (16, 32, 64, 128)
    encoder_blocks: Count = 4  # FCMs at 1/4 resolution
    dilations: tuple[Width, ...] = (2, 4, 8, 16, 2, 4, 8, 16)  # one FCM each at 1/8 (ERFNet's)
    decoder_blocks: Count = 2  # FCMs after each up-sampling
    encoder_dropout: tuple[Dropout, Dropout] = (0.03, 0.3)  # at 1/4 and 1/8 resolution (ERFNet's)
    decoder_dropout: Dropout = 0.0  # the paper's noise z

    def __post_init__(self) -> None:
        # YAML and JSON know no tuples; equality and hashing need them.
        for name in ("widths", "dilations", "encoder_dropout", "pam_pool"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.widths) != 4:
            raise ValueError(f"widths are four channel counts, not {self.widths}")
        if any(a >= b for a, b in itertools.pairwise(self.widths)):
            # The down-sampler's convolution adds the channels that its max-pool lacks.
            raise ValueError(f"widths must grow, not {self.widths}")
        if any(pool not in (1, 2, 4, 8) for pool in self.pam_pool):
            raise ValueError(f"pam_pool is two of 1, 2, 4 and 8, not {self.pam_pool}")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The architecture of the discriminator (section 3.0.3; 715,075 parameters by default)."""

    __pydantic_config__ = _STRICT

    width: Width = 64  # pix2pix's ndf
    pam: bool = True  # after the second layer
    cam: bool = True  # after the third layer
    cam_form: CamForm = "danet"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the generator's loss. A term of weight 0 is not computed."""

    __pydantic_config__ = _STRICT

    adversarial: Weight = 0.0  # eq. 7, first term; 1 in the paper
    l1: Weight = 0.0  # eq. 7, second term, λ
    jaccard: Weight = 1.0  # eq. 7, third term, α
    bce: Weight = 1.0  # pixel-wise; not in the paper's equation
    endpoint: Weight = 0.0  # of the mask's gradients; SLSDeep's (model.zoo.slsdeep)
    critic: Weight = 0.0  # multi-scale L1, in place of the adversary; SegAN's (model.zoo.segan)
    teacher: Share = 0.0  # share of the target that is a teacher's probability

    def __post_init__(self) -> None:
        if self.adversarial and self.critic:
            raise ValueError("loss.adversarial and loss.critic are two adversaries: choose one")
        terms = (self.adversarial, self.l1, self.jaccard, self.bce, self.endpoint, self.critic)
        if not any(terms):
            raise ValueError("every term has weight 0: there is nothing to learn from")


@dataclass(frozen=True)
class DataConfig:
    """The folders and tables that images come from, and which images are held out."""

    __pydantic_config__ = _STRICT

    allow_uniform_masks: bool = False  # accept masks that are empty or all lesion
    folds: Count = 0  # >0: hold out fold `fold` of so many of the training ids for selection
    fold: Count = 0
    groups: str | None = None  # CSV of ids and of the lesion or patient that each belongs to
    group_column: str = "lesion_id"  # the column of `groups` that holds them
    teacher: str | None = None  # file written by model.distill
    teachers: tuple[str, ...] = ()  # folders of finished runs, asked at every step

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", tuple(self.teachers))
        if self.folds == 1:
            raise ValueError("folds 1 would leave nothing to train on: set 2 or more, or 0")
        if self.folds and not 0 <= self.fold < self.folds:
            raise ValueError(f"fold {self.fold} is none of 0 to {self.folds - 1}")
        if self.teacher and self.teachers:
            raise ValueError("data.teacher and data.teachers both give the target: choose one")


@dataclass(frozen=True)
class TrainConfig:
    """A run's recipe: networks, losses, data and schedule. Wrong values raise ValueError."""

    __pydantic_config__ = _STRICT

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    network: str = "slsnet"  # teacher: a larger network to distil from; or one of model.zoo
    # Of a network of model.zoo. A dictionary has no hash; those of the other fields are enough.
    options: dict[str, Option] = field(default_factory=dict, hash=False)
    init: str | None = None  # weights (.safetensors) to start from, for fine-tuning
    size: int = 128  # side of the network's input, pixels (Table 5)
    augment: Recipe = "strong"
    epochs: int = 60
    batch_size: int = 16  # over all processes
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    weight_decay: Weight = 1e-2
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Share = 0.05  # share of the schedule with a rising rate; cosine only
    clip_norm: Weight = 1.0  # 0: no clipping
    ema_decay: Decay = 0.998  # of the weights' exponential average, which is kept; 0: none
    pam_wake: Share = 0.6  # share of the schedule with the 1/2-resolution PAMs asleep at η = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor has it
    early_stop: Count = 0  # epochs without a better validation Jaccard; 0: never
    validate_every: int = 1  # epochs
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    deterministic: bool = False
    compile: bool = False  # torch.compile; pays on a GPU

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("size", "epochs", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.size % 32:
            raise ValueError(f"size must be a multiple of 32, not {self.size}")
        known = ("slsnet", "teacher", *ZOO)
        if self.network not in known:
            raise ValueError(f"no network {self.network!r}; there are: {', '.join(known)}")
        if self.options and self.network not in ZOO:
            raise ValueError(f"options are of a network of model.zoo; {self.network} has none")
        if self.loss.teacher and not (self.data.teacher or self.data.teachers):
            raise ValueError(
                "loss.teacher needs data.teachers, folders of runs, or data.teacher, "
                "a file written by model.distill"
            )


_ADAPTER = TypeAdapter(TrainConfig)


def _paper() -> TrainConfig:
    """The preset of section 4: Adam 0.5/0.999, 2e-4, batch 8, λ 0.1, α 0.5; flips, gamma, CLAHE."""
    return TrainConfig(
        generator=GeneratorConfig(cam_form="eq1", decoder_dropout=0.1),
        discriminator=DiscriminatorConfig(cam_form="eq1"),
        loss=LossConfig(adversarial=1.0, l1=0.1, jaccard=0.5, bce=0.0),
        augment="paper",
        batch_size=8,
        optimizer="adam",
        betas=(0.5, 0.999),
        learning_rate=2e-4,
        weight_decay=0.0,
        schedule="constant",
        clip_norm=0.0,
        ema_decay=0.0,
        pam_wake=0.0,
        precision="fp32",
    )


def _paper_with(**changes: Any) -> TrainConfig:
    """The paper's preset with fields of its generator or loss replaced."""
    paper = _paper()
    names = {f.name for f in dataclasses.fields(LossConfig)}
    loss = {k: v for k, v in changes.items() if k in names}
    generator = {k: v for k, v in changes.items() if k not in names}
    return dataclasses.replace(
        paper,
        generator=dataclasses.replace(paper.generator, **generator),
        loss=dataclasses.replace(paper.loss, **loss),
    )


# The shipped weights were trained with `data.teacher` and `loss.teacher=0.4` besides.
_BEST = TrainConfig(
    generator=GeneratorConfig(encoder_dropout=(0.0, 0.1)),
    epochs=240,
    batch_size=32,
    learning_rate=1.5e-3,
    weight_decay=0.02,
    pam_wake=0.75,
)

PRESETS: dict[str, TrainConfig] = {
    "best": _BEST,
    # It reaches a validation Jaccard of 0.76 in an afternoon on two cores, four minutes on a GPU.
    "quick": dataclasses.replace(_BEST, epochs=30, batch_size=16, learning_rate=1e-3),
    "paper": _paper(),
    # Table 4: the network's parts
    "base": _paper_with(multiscale=False, pam=False, cam=False),
    "base+pam": _paper_with(multiscale=False, cam=False),
    "base+cam": _paper_with(multiscale=False, pam=False),
    "no-multiscale": _paper_with(multiscale=False),
    # Table 5: the input's side
    "input-64": dataclasses.replace(_paper(), size=64),
    "input-256": dataclasses.replace(_paper(), size=256),
    # Table 6: the losses
    "loss-bce": _paper_with(l1=0.0, jaccard=0.0),
    "loss-bce+l1": _paper_with(jaccard=0.0),
    "loss-bce+jaccard": _paper_with(l1=0.0),
    # The form of eq. 1 against DANet's
    "cam-danet": _paper_with(cam_form="danet"),
}


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, for YAML and checkpoints."""
    return _ADAPTER.dump_python(config, mode="json")  # type: ignore[no-any-return]


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths, so that it means the same in every working folder."""

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).absolute())

    data = dataclasses.replace(
        config.data,
        groups=absolute(config.data.groups),
        teacher=absolute(config.data.teacher),
        teachers=tuple(str(Path(run).absolute()) for run in config.data.teachers),
    )
    return dataclasses.replace(config, init=absolute(config.init), data=data)


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from plain values. A field that is not given keeps its default.

    Raises:
        ConfigError: a key does not exist or a value does not fit; the message names it.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = _keys(config_dict(TrainConfig()))
            elsewhere = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
            close = elsewhere or difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"keys: {', '.join(known)}"
            raise ConfigError(f"config key {key!r} does not exist; {hint}") from error
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            message += f"; a list is written in brackets: {key}=[a, b]"
        raise ConfigError(f"config key {key!r}: {message}" if key else message) from error


def read_values(file: Path) -> dict[str, Any]:
    """Read keys and values from a YAML file; an empty one has none.

    Raises:
        ConfigError: the file is unreadable, or holds something else.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # no UTF-8 and no day are ValueErrors
        raise ConfigError(f"{file} is not a readable YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold keys and values")
    return values


def load_config(
    preset: str = "best", file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Build a preset's configuration, changed by a YAML file, then by dotted `key: value`.

    Raises:
        ConfigError: the preset does not exist, the file is unreadable, a key is unknown, or a
            value does not fit.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; presets: {', '.join(PRESETS)}")
    values = config_dict(PRESETS[preset])
    if file is not None:
        _merge(values, read_values(file))
    for key, value in (overrides or {}).items():
        change: Any = value
        for part in reversed(key.split(".")):
            change = {part: change}
        _merge(values, change)
    return parse_config(values)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, whose values `parse_overrides` reads."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the training, as epochs=30 or loss.bce=0.5; may be repeated"
        " (docs/training.md has them all)",
    )


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` flags as overrides. Values are YAML.

    Raises:
        ConfigError: a flag has no `=`, or its value is not YAML.
    """
    overrides = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set takes KEY=VALUE, not {item!r}")
        try:
            overrides[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:  # 2024-13-45 is a ValueError
            raise ConfigError(f"--set {item}: the value is not readable: {error}") from error
    return overrides


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            keys += _keys(value, f"{prefix}{key}.")
        else:
            keys.append(prefix + key)
    return keys
