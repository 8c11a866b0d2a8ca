"""The pretrain stage: the pretext objective alone, before there is a downstream task."""

import copy
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import get_world_size
from bissl_zoo.engine.build import (
    Context,
    Weights,
    build_level,
    build_pretext,
    count_steps,
    pretext_batches,
    seed_everything,
    seed_rank,
)
from bissl_zoo.engine.trainer import SingleLevelTrainer, load_state
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


class Pretrain(SingleLevelTrainer):
    """Train trunk, tail and pretext head on unlabelled images.

    Args:
        average_decay: of a moving average of the weights, which then is what leaves the stage; None for none.
    """

    def __init__(self, level: Level, accumulate: int = 1, average_decay: float | None = None) -> None:
        super().__init__(level, accumulate)
        self.average = None if average_decay is None else WeightAverage(level, average_decay)

    def take_step(self) -> dict[str, Any]:
        """One step, and after it the teacher's and the average's."""
        metrics = super().take_step()
        self.level.head.after_step(self.level.backbone)
        if self.average is not None:
            self.average.update(self.level)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The level, and the average where there is one."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {**super().state_dict(), **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another architecture, or one of them has an average and the other has not.
        """
        super().load_state_dict(state)
        if (self.average is None) != ("average" not in state):
            has = "no average of the weights" if "average" not in state else "an average of the weights"
            raise CheckpointError(
                f"The checkpoint of {self.name} has {has}, and the configuration says otherwise. Set pretrain.ema as "
                "it was when the run began."
            )
        if self.average is not None:
            load_state(self.average, state["average"], "average of the weights")

    def averages(self) -> dict[str, nn.Module]:
        """The one of the weights, where there is one."""
        return {} if self.average is None else {"average of the weights": self.average}

    def result(self) -> Weights:
        """The pretrained trunk and pretext head."""
        source = self.level if self.average is None else self.average
        return Weights(backbone=source.backbone.state_dict(), pretext=source.head.state_dict())


def pretrain_steps(context: Context) -> int:
    """Optimizer steps of the stage."""
    cfg = context.cfg
    return count_steps(cfg.pretrain, "pretrain", context.data["pretext"], cfg.dataloader.pretext.batch_size)


def build_pretrain(context: Context, weights: Weights, start_step: int = 0) -> Pretrain:
    """The stage, ready to run from `weights`, its data from `start_step` on."""
    cfg = context.cfg
    settings = cfg.pretrain
    seed_everything(cfg.train.seed)
    trunk, pretext = build_pretext(cfg, weights, context.device)
    check_accumulation(cfg, pretext)
    if settings.channels_last:
        trunk, pretext = (module.to(memory_format=torch.channels_last) for module in (trunk, pretext))
    batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
    level = build_level(cfg, "pretrain", "pretrain", trunk, pretext, batches, pretrain_steps(context))
    trainer = Pretrain(level, settings.accumulate, settings.ema)
    if settings.compile:
        compile_backbones(trunk, pretext)
    seed_rank(cfg.train.seed)
    return trainer


def check_accumulation(cfg: DictConfig, pretext: PretextMethod) -> None:
    """Refuse gradient accumulation where it would be another objective, and a batch that does not divide.

    Raises:
        ConfigError: naming the methods and the batches with which it works.
    """
    parts, batch = cfg.pretrain.accumulate, cfg.dataloader.pretext.batch_size
    if parts == 1:
        return
    if not getattr(pretext, "supports_grad_accumulation", False):
        methods = {name: PRETEXT_METHODS.get(name) for name in PRETEXT_METHODS.list()}
        exact = [name for name, method in methods.items() if getattr(method, "supports_grad_accumulation", False)]
        raise ConfigError(
            f"pretrain.accumulate={parts}: the loss of '{cfg.pretext.name}' compares the images of a batch with each "
            "other, or leaves something of the whole batch behind, so that the parts of a batch do not add up to it. "
            f"Set pretrain.accumulate=1 and a batch that fits, or take a method where they do: {', '.join(exact)}."
        )
    if batch % (parts * get_world_size()):
        raise ConfigError(
            f"pretrain.accumulate={parts}: dataloader.pretext.batch_size={batch} on {get_world_size()} processes does "
            "not divide into so many equal parts."
        )


def compile_backbones(trunk: Backbone, pretext: PretextMethod) -> None:
    """Compile, in place, the trunk, the tail, and the copies of them that a method keeps, such as a teacher's."""
    for module in (trunk, *pretext.modules()):
        if isinstance(module, (Backbone, Tail)):
            module.compile()


class WeightAverage(nn.Module):
    """Copies of a level's backbone and head whose state follows theirs.

    What the level trains, and the batch-norm statistics that belong to it, move to `decay * own + (1 - decay) * new`;
    the rest, which has an average or a memory of its own (teachers, queues, counters), is copied. At update n the decay
    is at most `(1 + n) / (10 + n)`, so that the random weights of the start are forgotten in a short stage too.

    Args:
        decay: per optimizer step, in [0, 1).
    """

    def __init__(self, level: Level, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.backbone = copy.deepcopy(level.backbone).requires_grad_(False)
        self.head = copy.deepcopy(level.head).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, level: Level) -> None:
        """Follow the level after one of its optimizer steps."""
        self.updates += 1
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for own, new in ((self.backbone, level.backbone), (self.head, level.head)):
            for mine, theirs in zip(own.modules(), new.modules(), strict=True):
                _follow(mine, theirs, decay)


def _follow(own: nn.Module, new: nn.Module, decay: float) -> None:
    """Move what the module itself holds; its children are left out."""
    trained = any(parameter.requires_grad for parameter in new.parameters(recurse=False))
    statistics = trained and isinstance(new, nn.modules.batchnorm._BatchNorm)
    for mine, theirs in zip(own.parameters(recurse=False), new.parameters(recurse=False), strict=True):
        mine.lerp_(theirs, 1.0 - decay if theirs.requires_grad else 1.0)
    for mine, theirs in zip(own.buffers(recurse=False), new.buffers(recurse=False), strict=True):
        if statistics and theirs.is_floating_point():
            mine.lerp_(theirs, 1.0 - decay)
        else:
            mine.copy_(theirs)
