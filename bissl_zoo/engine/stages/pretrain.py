"""The pretrain stage: the pretext objective alone, on unlabelled images."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import get_world_size
from bissl_zoo.engine.build import build_level, build_pretext, pretext_batches
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.trainer import Context, SingleLevelTrainer, Stage, Weights, load_state
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS, STAGES


class PretrainTrainer(SingleLevelTrainer):
    """Train trunk, tail and pretext head on unlabelled images.

    Args:
        average_decay: decay of a moving average of the weights, which the stage then leaves; None for no average.
    """

    def __init__(self, level: Level, accumulate: int = 1, average_decay: float | None = None) -> None:
        super().__init__(level, accumulate)
        self.average = None if average_decay is None else WeightAverage(level, average_decay)

    def take_step(self) -> dict[str, Any]:
        """Take one step, then update the teacher and the average."""
        metrics = super().take_step()
        self.level.head.after_step(self.level.backbone)
        if self.average is not None:
            self.average.update(self.level)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the level and of the average."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {**super().state_dict(), **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            CheckpointError: the state belongs to another architecture, or only one of the two has an average.
        """
        super().load_state_dict(state)
        if (self.average is None) != ("average" not in state):
            content = "no average of the weights" if "average" not in state else "an average of the weights"
            raise CheckpointError(
                f"The checkpoint of {self.name} has {content}, unlike the configuration. Set pretrain.ema to the value "
                "that the run started with."
            )
        if self.average is not None:
            load_state(self.average, state["average"], "average of the weights")

    def averages(self) -> dict[str, nn.Module]:
        """Return the average of the weights, if there is one."""
        return {} if self.average is None else {"average of the weights": self.average}

    def result(self) -> Weights:
        """Return the pretrained trunk and pretext head, averaged if there is an average."""
        source = self.level if self.average is None else self.average
        return Weights(backbone=source.backbone.state_dict(), pretext=source.head.state_dict())


@STAGES.register("pretrain")
class Pretrain(Stage):
    """Train the pretext objective; reads `pretrain` of the config."""

    name = "pretrain"
    data_roles = ("pretext",)
    optimizers = ("pretrain",)
    section, epoch_role = "pretrain", "pretext"
    provides = ("backbone", "pretext")
    label = "pretrained"
    probed = "level"

    def needs(self, context: Context) -> Mapping[str, str]:
        """Return the warm-up of a new pretext head if `pretrain.head_warmup` is True."""
        return {"pretext": "pretext_warmup"} if context.cfg.pretrain.head_warmup else {}

    def check(self, context: Context, weights: Weights) -> None:
        """Check that gradient accumulation is exact for the method and divides the batch."""
        if context.cfg.pretrain.accumulate != 1:
            check_accumulation(context.cfg, build_pretext(context.cfg, weights, context.device)[1])

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> PretrainTrainer:
        """Return the trainer of trunk, tail and pretext head."""
        cfg = context.cfg
        settings = cfg.pretrain
        seed_everything(cfg.train.seed)
        trunk, pretext = build_pretext(cfg, weights, context.device)
        check_accumulation(cfg, pretext)
        if settings.channels_last:
            trunk, pretext = (module.to(memory_format=torch.channels_last) for module in (trunk, pretext))
        batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
        level = build_level(cfg, self.name, self.name, trunk, pretext, batches, self.steps(context))
        trainer = PretrainTrainer(level, settings.accumulate, settings.ema)
        if settings.compile:
            compile_backbones(trunk, pretext)
        seed_rank(cfg.train.seed)
        return trainer


def check_accumulation(cfg: DictConfig, pretext: PretextMethod) -> None:
    """Check that gradient accumulation keeps the objective, and that the batch divides.

    Raises:
        ConfigError: with the methods and batches for which it works.
    """
    parts, batch = cfg.pretrain.accumulate, cfg.dataloader.pretext.batch_size
    if parts == 1:
        return
    if not getattr(pretext, "supports_grad_accumulation", False):
        methods = {name: PRETEXT_METHODS.get(name) for name in PRETEXT_METHODS.list()}
        exact = [name for name, method in methods.items() if getattr(method, "supports_grad_accumulation", False)]
        raise ConfigError(
            f"pretrain.accumulate={parts}: the loss of '{cfg.pretext.name}' depends on the batch as a whole, so "
            "accumulation would change the objective. Set pretrain.accumulate=1 and a smaller batch, or use one of "
            f"{', '.join(exact)}."
        )
    if batch % (parts * get_world_size()):
        raise ConfigError(
            f"pretrain.accumulate={parts}: dataloader.pretext.batch_size={batch} on {get_world_size()} processes does "
            "not divide into that many equal parts."
        )


def compile_backbones(trunk: Backbone, pretext: PretextMethod) -> None:
    """Compile, in place, the trunk, the tail, and copies of them in a method, such as a teacher's."""
    for module in (trunk, *pretext.modules()):
        if isinstance(module, (Backbone, Tail)):
            module.compile()


class WeightAverage(nn.Module):
    """Exponential moving average of a level's backbone and head.

    Trained parameters and their batch-norm statistics are averaged, `decay * average + (1 - decay) * new`. The rest,
    such as teachers, queues and counters, is copied. At update n the decay is at
    most `(1 + n) / (10 + n)`, so that the random initial weights are forgotten in a short stage too.

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
        """Update the average after an optimizer step of `level`."""
        self.updates += 1
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for average, current in ((self.backbone, level.backbone), (self.head, level.head)):
            for mine, theirs in zip(average.modules(), current.modules(), strict=True):
                _update_module(mine, theirs, decay)


def _update_module(average: nn.Module, current: nn.Module, decay: float) -> None:
    """Update the module's parameters and buffers, without those of its children."""
    trained = any(parameter.requires_grad for parameter in current.parameters(recurse=False))
    statistics = trained and isinstance(current, nn.modules.batchnorm._BatchNorm)
    for mine, theirs in zip(average.parameters(recurse=False), current.parameters(recurse=False), strict=True):
        mine.lerp_(theirs, 1.0 - decay if theirs.requires_grad else 1.0)
    for mine, theirs in zip(average.buffers(recurse=False), current.buffers(recurse=False), strict=True):
        if statistics and theirs.is_floating_point():
            mine.lerp_(theirs, 1.0 - decay)
        else:
            mine.copy_(theirs)
