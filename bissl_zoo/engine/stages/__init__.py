"""Stages of the pipeline, one file per stage, and their order in a run."""

from bissl_zoo.engine.stages.bissl import Bissl, HeadWarmup, PretextWarmup, coupling
from bissl_zoo.engine.stages.finetune import BASELINE, Finetune, Teacher
from bissl_zoo.engine.stages.pretrain import Pretrain
from bissl_zoo.engine.trainer import Context, Stage, Weights
from bissl_zoo.registry import STAGES

__all__ = [
    "Bissl",
    "Finetune",
    "HeadWarmup",
    "PretextWarmup",
    "Pretrain",
    "Teacher",
    "alternates",
    "coupling",
    "find_stage",
    "plan_stages",
]


def find_stage(name: str) -> Stage | None:
    """Return the stage whose records and checkpoints have this name; None if it is not registered."""
    if name == BASELINE:
        return Finetune(Bissl.baseline_label, baseline=True)
    return STAGES.build(name) if name in STAGES else None


def alternates(name: str) -> bool:
    """Return True if a step of the registered stage `name` is an alternation between two levels."""
    stage = find_stage(name)
    return stage is not None and stage.unit == "alternation"


def plan_stages(context: Context, initial: Weights) -> list[Stage]:
    """Return the stages of a run in order: those of `train.stages`, each after the warm-ups it needs.

    A warm-up is inserted if neither an earlier stage nor `initial` provides the part of the weights that it trains.
    """
    names = list(context.cfg.train.stages)
    stages: list[Stage] = []
    provided = {"pretext"} if initial.pretext is not None else set()
    for name in names:
        stage = STAGES.build(name)
        for part, warmup in stage.needs(context).items():
            if part not in provided and warmup not in names:
                stages += [needed for needed in [STAGES.build(warmup)] if needed.steps(context)]
        stages += stage.expand(context, stages)
        provided |= set(stage.provides)
    return stages
