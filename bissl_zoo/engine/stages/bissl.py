"""The BiSSL stage: warm-up of the heads that are new, then alternations between the levels."""

from dataclasses import replace
from typing import Any

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.bilevel import Adaptation, BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.engine.build import (
    Context,
    Weights,
    build_downstream,
    build_level,
    build_part,
    build_pretext,
    count_steps,
    pretext_batches,
    seed_everything,
    seed_rank,
    train_batches,
)
from bissl_zoo.engine.stages.pretrain import Pretrain
from bissl_zoo.engine.trainer import SingleLevelTrainer, Trainer
from bissl_zoo.optim import LRMultiplier, effective_learning_rate
from bissl_zoo.pretext import PretextMethod

PRETEXT_WARMUP = "pretext_warmup"
HEAD_WARMUP = "head_warmup"

#: below this, the lower level has no time to follow the upper one
LEAST_COUPLING = 0.3


class PretextWarmup(Pretrain):
    """Train a new pretext head on the frozen backbone, so that the lower level does not start from a random one."""

    def __init__(self, level: Level) -> None:
        super().__init__(level)
        level.backbone.eval()


class HeadWarmup(SingleLevelTrainer):
    """Train the downstream head on the frozen backbone, so that the first hypergradients mean something."""

    def __init__(self, level: Level, backbone_mode: str, weights: Weights) -> None:
        super().__init__(level)
        self.weights = weights
        level.backbone.train(backbone_mode == "train")

    def result(self) -> Weights:
        """What came in, and the warm head."""
        return replace(self.weights, task=self.level.head.state_dict())


class Bissl(Trainer):
    """Alternations of the bilevel problem; a step is an alternation."""

    headline = (
        "lower/total_loss",
        "upper/total_loss",
        "solver/residual",
        "solver/products",
        "solver/status",
        "solver/damping",
        "lower/lr",
    )
    record_key = "upper_step"

    def __init__(self, problem: BiLevel) -> None:
        super().__init__("bissl", problem.alternations)
        self.problem = problem

    def run_step(self) -> dict[str, Any]:
        """One alternation; its upper steps are the records, counted over the stage from 1."""
        before = self.problem.upper.step
        metrics = self.problem.alternate(self.step)
        self.records = [
            {self.record_key: number, **figures}
            for number, figures in enumerate(self.problem.diagnostics, before + 1)
            if figures  # of a step that was undone there are none
        ]
        return metrics

    def levels(self) -> dict[str, Level]:
        """Both levels."""
        return {"lower": self.problem.lower, "upper": self.problem.upper}

    def state_dict(self) -> dict[str, Any]:
        """Both levels, the shift that automatic damping has come to, and the count of fallbacks."""
        return {**super().state_dict(), "shift": self.problem.shift, "fallbacks": self.problem.fallbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; without a shift in it, automatic damping begins anew."""
        super().load_state_dict(state)
        self.problem.shift = state.get("shift")
        self.problem.fallbacks = state.get("fallbacks", 0)

    def result(self) -> Weights:
        """The lower backbone, which is what leaves the stage, and both heads."""
        lower, upper = self.problem.lower, self.problem.upper
        return Weights(lower.backbone.state_dict(), pretext=lower.head.state_dict(), task=upper.head.state_dict())


def pretext_head_is_new(cfg: DictConfig, initial: Weights) -> bool:
    """Whether nothing has trained a pretext head before the BiSSL stage: not the run, nor what it starts from."""
    stages = cfg.train.stages
    return "bissl" in stages and "pretrain" not in stages and initial.pretext is None


def pretext_warmup_steps(context: Context) -> int:
    """Optimizer steps of the pretext warm-up, where there is one."""
    cfg = context.cfg
    section = cfg.bilevel.pretext_warmup
    return count_steps(section, "bilevel.pretext_warmup", context.data["pretext"], cfg.dataloader.pretext.batch_size)


def warmup_steps(context: Context) -> int:
    """Optimizer steps of the head warm-up."""
    cfg = context.cfg
    section = cfg.bilevel.head_warmup
    return count_steps(section, "bilevel.head_warmup", context.data["train"], cfg.dataloader.train.batch_size)


def bissl_steps(context: Context) -> int:
    """Alternations of the stage."""
    return context.cfg.bilevel.alternations


def build_pretext_warmup(context: Context, weights: Weights, start_step: int = 0) -> PretextWarmup:
    """The warm-up: the lower level's optimizer at its base rate, on the frozen backbone, tail included."""
    cfg = context.cfg
    seed_everything(cfg.train.seed)
    trunk, pretext = build_pretext(cfg, weights, context.device)
    _freeze_backbones(pretext)
    batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
    level = build_level(
        cfg, PRETEXT_WARMUP, "lower", trunk, pretext, batches, pretext_warmup_steps(context), train_backbone=False
    )
    level.lr_scheduler = LRMultiplier(ConstantParamScheduler(1.0))  # that of `lower` is made for the alternations
    seed_rank(cfg.train.seed)
    return PretextWarmup(level)


def _freeze_backbones(pretext: PretextMethod) -> None:
    """Freeze the tail, and copies of trunk and tail such as a teacher's, which stay equal to what they copy."""
    for module in pretext.modules():
        if isinstance(module, (Backbone, Tail)):
            module.requires_grad_(False).eval()


def build_head_warmup(context: Context, weights: Weights, start_step: int = 0) -> HeadWarmup:
    """The warm-up: the upper level's optimizer at its base rate, on the frozen backbone."""
    cfg = context.cfg
    seed_everything(cfg.train.seed)
    trunk, task = build_downstream(context, Weights(weights.backbone))
    batches = train_batches(context, task, cfg.train.seed, start_step)
    level = build_level(
        cfg, HEAD_WARMUP, HEAD_WARMUP, trunk, task, batches, warmup_steps(context), train_backbone=False
    )
    seed_rank(cfg.train.seed)
    return HeadWarmup(level, cfg.bilevel.head_warmup.backbone_mode, weights)


def build_bissl(context: Context, weights: Weights, start_step: int = 0) -> Bissl:
    """The alternations, both levels from the same backbone; `start_step` counts alternations done."""
    cfg = context.cfg
    settings = cfg.bilevel
    seed_everything(cfg.train.seed)
    lower_trunk, pretext = build_pretext(cfg, weights, context.device)
    upper_trunk, task = build_downstream(context, weights)
    # each alternation takes one more pretext batch, the one that defines the curvature
    lower_batches = pretext_batches(context, pretext, cfg.train.seed + 1, start_step * (settings.lower_steps + 1))
    upper_batches = train_batches(context, task, cfg.train.seed + 1, start_step * settings.upper_steps)
    lower_total, upper_total = (n * settings.alternations for n in (settings.lower_steps, settings.upper_steps))
    problem = BiLevel(
        lower=build_level(cfg, "lower", "lower", lower_trunk, pretext, lower_batches, lower_total),
        upper=build_level(cfg, "upper", "upper", upper_trunk, task, upper_batches, upper_total),
        solver=build_part(cfg.solver),
        lam=settings["lambda"],
        gamma=settings.gamma,
        lower_steps=settings.lower_steps,
        upper_steps=settings.upper_steps,
        alternations=settings.alternations,
        adaptation=Adaptation(**settings.adaptation) if settings.adaptation else None,
        curvature_batch_size=settings.curvature_batch_size,
        update_bn_stats=settings.update_bn_stats,
        hvp_mode=settings.hvp_mode,
        on_bad_hypergradient=settings.on_bad_hypergradient,
    )
    seed_rank(cfg.train.seed + 1)
    return Bissl(problem)


def coupling(context: Context) -> float | None:
    """`lambda * lr_eff * lower steps`: how many time constants the lower level has to follow the upper one.

    `lr_eff = lr / (1 - momentum)`, summed over the schedule. Of the order of 1 to 10 is wanted. None where the lower
    optimizer is not SGD: steps of LARS, LAMB and Adam are not the rate times the gradient but scaled anew each time,
    so that the pull `lambda * (theta_P - theta_D)` has no rate of its own.
    """
    cfg = context.cfg
    optimizer = build_part(cfg.optimizer.lower, params=[torch.zeros(1, requires_grad=True)])
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    steps = cfg.bilevel.lower_steps * cfg.bilevel.alternations
    return cfg.bilevel["lambda"] * effective_learning_rate(optimizer) * build_part(cfg.lr_multiplier.lower).total(steps)
