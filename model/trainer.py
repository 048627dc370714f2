"""One training step and the state that it changes.

Precision and data-parallel gradients are a few lines of `torch.autocast` and `all_reduce`. One CUDA
graph captures the whole step, and the wrappers of Lightning Fabric or Accelerate would be in its
way. The weights' average is one fused call, with a decay that warms up, since
`torch.optim.swa_utils.AveragedModel` walks all modules at every step.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from model import losses
from model.augment import Augmenter
from model.config import ConfigError, TrainConfig
from model.data import PixelSet
from model.discriminator import Discriminator
from model.generator import Generator
from model.networks import new_network
from model.precision import autocast
from model.zoo.network import ZooNetwork
from model.zoo.segan import Critic


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


@dataclass
class RunProgress:
    """How far a run is. The checkpoint holds all of it."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stopped: bool = False  # the run was stopped early
    history: list[dict[str, float]] = field(default_factory=list)

    def is_over(self, epochs: int) -> bool:
        """Whether a schedule of this many epochs is finished."""
        return self.stopped or self.epoch >= epochs


class Trainer:
    """One step of a run and its state: networks, their average, optimisers, progress.

    Args:
        selections: sets to select by, by name; the official validation set first if there is one.
        origin: the training images in words, for the weights' metadata.
        fresh: whether to start from `init` or weights of a package. A checkpoint needs neither.

    Raises:
        ConfigError: the configuration does not fit the data or the number of processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        training: PixelSet,
        selections: dict[str, PixelSet],
        origin: str = "",
        *,
        fresh: bool = True,
    ) -> None:
        self.config, self.out = config, out
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        _check_batches(config, self.world, len(training.ids))
        self.device = _prepare_device(config)
        self.steps_per_epoch = len(training.ids) // config.batch_size
        self.total_steps = self.steps_per_epoch * config.epochs

        torch.manual_seed(config.seed)
        self.network = new_network(config)
        if fresh and config.init is not None:
            _initialise(self.network, Path(config.init))
        elif fresh and isinstance(self.network, ZooNetwork):
            self.network.start()
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = _adversary(config).to(self.device)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.network) if config.compile else self.network
        )
        self.optimizer = _optimizer(self.network, config)
        self.discriminator_optimizer = _optimizer(self.discriminator, config)
        # Found once, since walking hundreds of modules takes longer than averaging them.
        self._averaged, self._averages = _floats(self.average), _floats(self.network)
        self.progress = RunProgress()
        captured = self.device.type == "cuda" and self.world == 1 and not config.compile
        self.graph = _StepGraph(self) if captured else None

        self.ids, self.origin, self.selections = training.ids, origin, selections
        self.images = torch.from_numpy(training.images).to(self.device)
        stored = training.images.shape[-1]
        self.augmenter = Augmenter(config.augment, config.size, stored, self.device)
        # The masks, uint8 [n, 1, stored, stored], and what `data.teacher` says beside them.
        self.targets = torch.from_numpy(training.masks).to(self.device)
        # Views [n, 3, size, size] of the images with these indices → a teacher's probabilities.
        self.teach: Callable[[Tensor, Tensor], Tensor] | None = None
        self.taught_by: list[str] | None = None  # digests of what teaches; None: not known yet

    def step(self, batch: Tensor) -> dict[str, Tensor]:
        """Update the discriminator, if there is one, and the generator, once each.

        Args:
            batch: indices of the images of the global batch, int64 [batch_size].

        Returns:
            The loss and its terms, detached scalars.
        """
        config, step, weights = self.config, self.progress.step, self.config.loss
        share = config.batch_size // self.world
        part = slice(self.rank * share, (self.rank + 1) * share)
        mine = batch[part]
        seed = config.seed * 1_000_003 + step
        x, y = self.augmenter(self.images[mine], self.targets[mine], seed, part, config.batch_size)
        truth, target = y[:, :1], y[:, :1]
        if weights.teacher:
            told = self.teach(x, mine) if self.teach else y[:, 1:]
            target = torch.lerp(truth, told, weights.teacher)
        torch.manual_seed(seed * self.world + self.rank)  # dropout: the paper's z

        for optimizer in (self.optimizer, self.discriminator_optimizer):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(self.rate(step))
                else:
                    group["lr"] = self.rate(step)
        x = x.contiguous(memory_format=torch.channels_last)
        asleep = self.wake_or_sleep()
        if self.graph is not None:
            terms = self.graph(x, truth, target, asleep)
        else:
            terms = self.update(x, truth, target)
        self._average()
        return terms

    def update(self, x: Tensor, truth: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Run the update. Nothing in it waits for the device, so a graph can capture it."""
        weights = self.config.loss
        with autocast(self.config, self.device):
            logits = self.forward(x)
        logits = logits.float()
        probability = logits.sigmoid()
        terms: dict[str, Tensor] = {}
        if weights.adversarial:
            with autocast(self.config, self.device):
                real = self.discriminator(x, truth)
                fake = self.discriminator(x, probability.detach())
            terms["discriminator"] = losses.discriminator_loss(real.float(), fake.float())
            self._update(self.discriminator, self.discriminator_optimizer, terms["discriminator"])
            self.discriminator.requires_grad_(False)
            with autocast(self.config, self.device):
                fake = self.discriminator(x, probability)
            terms["adversarial"] = losses.adversarial_loss(fake.float())
            self.discriminator.requires_grad_(True)
        elif weights.critic:
            self._criticise(x, truth, probability, terms)
        if weights.l1:
            terms["l1"] = losses.l1_loss(probability, target)
        if weights.jaccard:
            terms["jaccard_loss"] = losses.jaccard_loss(probability, target)
        if weights.bce:
            terms["bce"] = losses.bce_loss(logits, target)
        if weights.endpoint:
            terms["endpoint"] = losses.endpoint_error(probability, target)
        scale = {
            "adversarial": weights.adversarial,
            "l1": weights.l1,
            "jaccard_loss": weights.jaccard,
            "bce": weights.bce,
            "endpoint": weights.endpoint,
            "critic": weights.critic,
        }
        loss = torch.stack([scale[k] * v for k, v in terms.items() if k in scale]).sum()
        self._update(self.network, self.optimizer, loss)
        return {k: v.detach() for k, v in {"loss": loss, **terms}.items()}

    def _criticise(
        self, x: Tensor, truth: Tensor, probability: Tensor, terms: dict[str, Tensor]
    ) -> None:
        """Update SegAN's critic, which makes the difference large, and add what it then sees."""
        with autocast(self.config, self.device):
            real = self.discriminator(x, truth)
            fake = self.discriminator(x, probability.detach())
        terms["discriminator"] = -F.l1_loss(fake.float(), real.float())
        self._update(self.discriminator, self.discriminator_optimizer, terms["discriminator"])
        with torch.no_grad():
            for weight in self.discriminator.parameters():
                weight.clamp_(-Critic.CLIP, Critic.CLIP)
        self.discriminator.requires_grad_(False)
        with autocast(self.config, self.device):
            real, fake = self.discriminator(x, truth), self.discriminator(x, probability)
        terms["critic"] = F.l1_loss(fake.float(), real.float())
        self.discriminator.requires_grad_(True)

    def _update(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= self.world
            parts = torch.split(flat, [g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_norm)
        optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        """Average weights and running statistics. The decay is warmed up as timm does it."""
        step = self.progress.step
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._averages, 1 - decay)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        config = self.config
        if config.schedule == "constant":
            return config.learning_rate
        warmup = max(1.0, config.warmup * self.total_steps)
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1.0, self.total_steps - warmup)
        return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)

    def wake_or_sleep(self) -> bool:
        """Put half-resolution PAMs to sleep, or wake them; awake they cost two thirds of a step."""
        if not isinstance(self.network, Generator):
            return False
        asleep = self.progress.step < self.config.pam_wake * self.total_steps
        for network in (self.network, self.average):
            for attention in cast(Generator, network).half_resolution_attention():
                attention.mode = "asleep" if asleep else "fused"
        return asleep

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def weights_are_finite(self) -> Tensor:
        """Whether all weights and running statistics are finite: a bool on the device."""
        return torch.stack([t.isfinite().all() for t in self._averages]).all()


class _StepGraph:
    """One update as a CUDA graph. A light network's kernels take longer to launch than to run."""

    WARM_UP_STEPS = 3  # ordinary steps, in which libraries allocate and choose kernels

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.asleep: bool | None = None

    def __call__(self, x: Tensor, truth: Tensor, target: Tensor, asleep: bool) -> dict[str, Tensor]:
        if asleep != self.asleep:  # the PAMs woke up, which needs another graph
            self.asleep, self.warm, self.graph = asleep, 0, None
        if self.warm < self.WARM_UP_STEPS:
            self.warm += 1
            return self.trainer.update(x, truth, target)
        if self.graph is None:
            self.inputs = [x.clone(), truth.clone(), target.clone()]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.terms = self.trainer.update(*self.inputs)
        for mine, given in zip(self.inputs, (x, truth, target), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return {name: value.clone() for name, value in self.terms.items()}


def _adversary(config: TrainConfig) -> nn.Module:
    if config.loss.critic:
        return Critic(config.discriminator.width)
    return Discriminator(config.discriminator)


def _check_batches(config: TrainConfig, world: int, images: int) -> None:
    if config.batch_size % world:
        raise ConfigError(f"batch_size {config.batch_size} does not divide by {world} processes")
    if images < config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than the training set of {images} images"
        )


def _prepare_device(config: TrainConfig) -> torch.device:
    """The device of this process, set up for the steps of a run."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    # A graph can only be captured on its own stream, after warm-up steps on that stream.
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    torch.backends.cudnn.benchmark = not config.deterministic
    return device


def _initialise(network: nn.Module, path: Path) -> None:
    try:
        given = load_file(path)
    except Exception as error:  # safetensors raises its own untyped errors
        raise ConfigError(f"init: {path} holds no readable weights: {error}") from error
    wanted = network.state_dict()
    both = given.keys() & wanted.keys()
    differences = {
        "missing": sorted(wanted.keys() - both),
        "unknown": sorted(given.keys() - both),
        "of another shape": sorted(n for n in both if given[n].shape != wanted[n].shape),
    }
    if told := [
        f"{len(names)} {what} (the first: {names[0]})"
        for what, names in differences.items()
        if names
    ]:
        raise ConfigError(
            f"init: {path} does not fit this network: of its {len(wanted)} tensors "
            f"{', '.join(told)}; start from weights of the same `network` and `generator`"
        )
    network.load_state_dict(given)


def _floats(network: nn.Module) -> list[Tensor]:
    return [t for t in network.state_dict(keep_vars=True).values() if t.is_floating_point()]


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # Weight decay spares biases, norms and the attentions' η and γ, which it would pull to zero.
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    cuda = matrices[0].is_cuda
    rate = (
        torch.tensor(config.learning_rate, device=matrices[0].device)
        if cuda
        else config.learning_rate
    )
    return kind(groups, lr=rate, betas=config.betas, fused=True, capturable=cuda)
