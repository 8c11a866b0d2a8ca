"""The BiSSL stage (arXiv 2410.02387), and the warm-ups that train new heads before it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.backbones.lora import add_lora, share_frozen
from bissl_zoo.bilevel import Adaptation, BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.bilevel.summary import HypergradientSummary
from bissl_zoo.engine.build import (
    build_downstream,
    build_level,
    build_part,
    build_pretext,
    build_split_backbone,
    pretext_batches,
    train_batches,
)
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.stages.pretrain import PretrainTrainer
from bissl_zoo.engine.trainer import Context, SingleLevelTrainer, Stage, Trainer, Weights, load_state
from bissl_zoo.errors import ConfigError
from bissl_zoo.optim import LRMultiplier, effective_learning_rate
from bissl_zoo.pretext.teacher import Teacher
from bissl_zoo.registry import STAGES

logger = logging.getLogger(__name__)

PRETEXT_WARMUP, HEAD_WARMUP = "pretext_warmup", "head_warmup"

#: smallest `lambda * lr_eff * lower steps` with which the lower level can follow the upper one
MIN_COUPLING = 0.3


class BisslTrainer(Trainer):
    """Alternate between the levels of a bilevel problem; a step is an alternation."""

    headline = ("lower/total_loss", "upper/total_loss", "lower/lr")
    details = ("solver/residual", "solver/products", "solver/status", "solver/damping", "solver/cos_xv")
    record_key = "upper_step"

    def __init__(self, problem: BiLevel, entered: Weights | None = None) -> None:
        super().__init__("bissl", problem.alternations)
        self.problem = problem
        self.entered = entered
        self.hypergradients = HypergradientSummary()

    def run_step(self) -> dict[str, Any]:
        """Run one alternation; its upper steps are the records, numbered over the stage from 1."""
        before = self.problem.upper.step
        metrics = self.problem.alternate(self.step)
        self.hypergradients.update(self.problem.diagnostics)
        self.records = [
            {self.record_key: number, **record}
            for number, record in enumerate(self.problem.diagnostics, before + 1)
            if record  # empty if the step was undone
        ]
        return metrics

    def levels(self) -> dict[str, Level]:
        """Return both levels."""
        return {"lower": self.problem.lower, "upper": self.problem.upper}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both levels, the shift of automatic damping, and what was counted over the stage."""
        return {
            **super().state_dict(),
            "shift": self.problem.shift,
            "fallbacks": self.problem.fallbacks,
            "hypergradients": self.hypergradients.state_dict(),
            "solver": self.problem.solver.state_dict() if hasattr(self.problem.solver, "state_dict") else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called; without a shift in it, automatic damping starts again."""
        super().load_state_dict(state)
        self.problem.shift = state.get("shift")
        self.problem.fallbacks = state.get("fallbacks", 0)
        if "hypergradients" in state:  # not in checkpoints of earlier versions
            self.hypergradients.load_state_dict(state["hypergradients"])
        if state.get("solver"):
            self.problem.solver.load_state_dict(state["solver"])

    @property
    def summary(self) -> str:
        """One sentence about the hypergradients of the stage."""
        return self.hypergradients.sentence()

    def result(self) -> Weights:
        """Return the lower backbone and both heads."""
        lower, upper = self.problem.lower, self.problem.upper
        return Weights(
            lower.backbone.state_dict(),
            pretext=lower.head.state_dict(),
            task=upper.head.state_dict(),
            previous=self.entered,
        )


@STAGES.register("bissl")
class Bissl(Stage):
    """Align the backbone with the downstream task; reads `bilevel` and `solver` of the config."""

    name = "bissl"
    data_roles = ("pretext", "train")
    optimizers = ("lower", "upper")
    requires = {"pretext": PRETEXT_WARMUP, "task": HEAD_WARMUP}
    provides = ("backbone", "pretext", "task")
    follows = ("pretrain",)
    unit = "alternation"
    purpose = "align the backbone with the task: pretext steps on the unlabelled images, steered by the labels"
    label = "bissl"
    baseline_label = "pretrained"
    probed = "lower"

    def steps(self, context: Context) -> int:
        """Return the number of alternations."""
        return context.cfg.bilevel.alternations

    def describe(self, context: Context) -> tuple[str, str]:
        """Return alternations with their steps, and the batch sizes of both levels."""
        b, loaders = context.cfg.bilevel, context.cfg.dataloader
        length = f"{b.alternations} x ({b.lower_steps} lower, {b.upper_steps} upper)"
        return length, f"{loaders.pretext.batch_size} and {loaders.train.batch_size}"

    def check(self, context: Context, weights: Weights) -> None:
        """Check that the solver's damping is positive together with lambda, and that it knows the optimizer."""
        solver, lam = build_part(context.cfg.solver), context.cfg.bilevel["lambda"]
        if context.cfg.bilevel.lora:
            add_lora(build_split_backbone(context.cfg)[0], **context.cfg.bilevel.lora)
        if hasattr(solver, "attach"):
            try:
                solver.attach(build_part(context.cfg.optimizer.lower, params=[torch.zeros(1, requires_grad=True)]), [])
            except ValueError as error:
                raise ConfigError(f"optimizer.lower: {error}") from error
        if solver.damping != "auto":
            if not lam + solver.damping > 0:
                raise ConfigError(
                    f"solver.damping is {solver.damping}; bilevel.lambda + solver.damping must be positive."
                )
        elif context.cfg.bilevel.curvature == "hessian" and not (
            getattr(solver, "iterations", 0) >= 1 and getattr(solver, "tolerance", 0) > 0
        ):
            raise ConfigError(
                "solver.damping=auto with bilevel.curvature=hessian is the smallest damping with which "
                "solver.iterations reach solver.tolerance; both must be positive. Set them, or give a number for "
                "solver.damping."
            )

    def announce(self, context: Context, weights: Weights, stages: Sequence[Stage]) -> None:
        """Warn about a coupling that is too weak and about a pretext head that nothing has trained."""
        value = coupling(context)
        if value is not None and value < MIN_COUPLING:
            logger.warning(
                f"lambda * lr_eff * lower steps = {value:.2g}, below {MIN_COUPLING}: the lower level has no time to "
                "follow the upper one, and the stage will have next to no effect. Raise bilevel.lambda."
            )
        earlier = stages[: stages.index(self)]
        if weights.pretext is not None or any("pretext" in stage.provides for stage in earlier if stage.label):
            return
        missing = f"train.init brings no pretext head of {context.cfg.pretext.name}"
        steps = sum(stage.steps(context) for stage in earlier if stage.name == self.requires["pretext"])
        if steps:
            logger.info(f"{missing}: a new one is trained for {steps} steps on the frozen backbone before this stage.")
        else:
            logger.warning(
                f"{missing} and bilevel.pretext_warmup has 0 steps: the BiSSL stage starts with a random one."
            )

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> BisslTrainer:
        """Return the trainer of both levels, which start from the same backbone."""
        cfg = context.cfg
        settings = cfg.bilevel
        seed_everything(cfg.train.seed)
        lower_trunk, pretext = build_pretext(cfg, weights, context.device, settings.lora)
        upper_trunk, task = build_downstream(context, weights, settings.lora)
        if settings.lora:
            load_state(upper_trunk, lower_trunk.state_dict(), "LoRA")  # with the same random factors
            share_frozen(lower_trunk, upper_trunk)
        groups = None
        if settings.lower_head_lr is not None:
            trained = [[p for p in part.parameters() if p.requires_grad] for part in (lower_trunk, pretext)]
            groups = [{"params": trained[0]}, {"params": trained[1], "lr": settings.lower_head_lr}]
        if settings.reset_teacher and isinstance(teacher := getattr(pretext, "teacher", None), Teacher):
            teacher.reset(backbone=lower_trunk, tail=pretext.tail, projector=pretext.projector)
        # an alternation takes one more pretext batch, for the curvature
        lower_batches = pretext_batches(context, pretext, cfg.train.seed + 1, start_step * (settings.lower_steps + 1))
        upper_batches = train_batches(context, task, cfg.train.seed + 1, start_step * settings.upper_steps)
        lower_total, upper_total = (n * settings.alternations for n in (settings.lower_steps, settings.upper_steps))
        problem = BiLevel(
            lower=build_level(cfg, "lower", "lower", lower_trunk, pretext, lower_batches, lower_total, groups=groups),
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
            curvature=settings.curvature,
            curvature_precision=settings.curvature_precision,
            hvp_mode=settings.hvp_mode,
            on_bad_hypergradient=settings.on_bad_hypergradient,
        )
        seed_rank(cfg.train.seed + 1)
        return BisslTrainer(problem, weights)

    def weights_of(self, state: dict[str, Any]) -> Weights:
        """Return the lower backbone and both heads of a checkpoint."""
        lower, upper = state["levels"]["lower"], state["levels"]["upper"]
        return Weights(lower["backbone"], pretext=lower["head"], task=upper["head"])


class PretextWarmupTrainer(PretrainTrainer):
    """Train a new pretext head on the frozen backbone, in eval mode; a method without parameters has nothing to train.

    Its stage then has one step, which only saves its state.
    """

    def __init__(self, level: Level) -> None:
        super().__init__(level)
        level.backbone.eval()

    def take_step(self) -> dict[str, Any]:
        """Take one step, if the head has parameters."""
        if self.level.head_parameters:
            return super().take_step()
        self.level.step += 1
        return {"total_loss": math.nan}


@STAGES.register(PRETEXT_WARMUP)
class PretextWarmup(Stage):
    """Train a new pretext head on the frozen backbone, so that the lower level does not start from a random one."""

    name = PRETEXT_WARMUP
    data_roles = ("pretext",)
    optimizers = ("lower",)
    section, epoch_role = "bilevel.pretext_warmup", "pretext"
    purpose = "train a new pretext head on the frozen backbone"
    provides = ("pretext",)

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> PretextWarmupTrainer:
        """Return the trainer of the head, with the lower level's optimizer at its base rate."""
        cfg = context.cfg
        seed_everything(cfg.train.seed)
        trunk, pretext = build_pretext(cfg, weights, context.device)
        for module in pretext.modules():  # the tail, and copies of trunk and tail such as a teacher's, which stay equal
            if isinstance(module, (Backbone, Tail)):
                module.requires_grad_(False).eval()
        batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
        trained = [p for p in pretext.parameters() if p.requires_grad]
        steps, groups = (self.steps(context), None) if trained else (1, [{"params": []}])
        level = build_level(cfg, self.name, "lower", trunk, pretext, batches, steps, False, groups)
        level.lr_scheduler = LRMultiplier(ConstantParamScheduler(1.0))  # that of `lower` is made for the alternations
        seed_rank(cfg.train.seed)
        return PretextWarmupTrainer(level)


class HeadWarmupTrainer(SingleLevelTrainer):
    """Train the downstream head on the frozen backbone."""

    def __init__(self, level: Level, backbone_mode: str, weights: Weights) -> None:
        super().__init__(level)
        self.weights = weights
        level.backbone.train(backbone_mode == "train")

    def result(self) -> Weights:
        """Return the weights the stage started from, with the trained head."""
        return replace(self.weights, task=self.level.head.state_dict())


@STAGES.register(HEAD_WARMUP)
class HeadWarmup(Stage):
    """Train the downstream head on the frozen backbone, so that the first hypergradients are meaningful."""

    name = HEAD_WARMUP
    data_roles = ("train",)
    optimizers = (HEAD_WARMUP,)
    section, epoch_role = "bilevel.head_warmup", "train"
    purpose = "train the task's head on the frozen backbone"
    provides = ("task",)

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> HeadWarmupTrainer:
        """Return the trainer of a new head, with the optimizer `head_warmup`."""
        cfg = context.cfg
        seed_everything(cfg.train.seed)
        trunk, task = build_downstream(context, Weights(weights.backbone))
        batches = train_batches(context, task, cfg.train.seed, start_step)
        level = build_level(cfg, self.name, self.name, trunk, task, batches, self.steps(context), train_backbone=False)
        seed_rank(cfg.train.seed)
        return HeadWarmupTrainer(level, cfg.bilevel.head_warmup.backbone_mode, weights)


def coupling(context: Context) -> float | None:
    """Return `lambda * lr_eff * lower steps`, the number of time constants in which the lower level follows the upper.

    `lr_eff = lr / (1 - momentum)`, summed over the schedule. Values from 1 to 10 are useful. None if the lower
    optimizer is not SGD: LARS, LAMB and Adam rescale each step, so the pull `lambda * (theta_P - theta_D)` has no
    constant rate.
    """
    cfg = context.cfg
    optimizer = build_part(cfg.optimizer.lower, params=[torch.zeros(1, requires_grad=True)])
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    steps = cfg.bilevel.lower_steps * cfg.bilevel.alternations
    return cfg.bilevel["lambda"] * effective_learning_rate(optimizer) * build_part(cfg.lr_multiplier.lower).total(steps)
