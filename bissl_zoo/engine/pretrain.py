"""The pretrain stage: the pretext objective alone, before there is a downstream task."""

from typing import Any

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
from bissl_zoo.engine.trainer import SingleLevelTrainer


class Pretrain(SingleLevelTrainer):
    """Train trunk, tail and pretext head on unlabelled images."""

    def run_step(self) -> dict[str, Any]:
        """One step, and the teacher's after it."""
        metrics = super().run_step()
        self.level.head.after_step(self.level.backbone)
        return metrics

    def result(self) -> Weights:
        """The pretrained trunk and pretext head."""
        return Weights(backbone=self.level.backbone.state_dict(), pretext=self.level.head.state_dict())


def pretrain_steps(context: Context) -> int:
    """Optimizer steps of the stage."""
    cfg = context.cfg
    return count_steps(cfg.pretrain, "pretrain", context.data["pretext"], cfg.dataloader.pretext.batch_size)


def build_pretrain(context: Context, weights: Weights, start_step: int = 0) -> Pretrain:
    """The stage, ready to run from `weights`, its data from `start_step` on."""
    cfg = context.cfg
    seed_everything(cfg.train.seed)
    trunk, pretext = build_pretext(cfg, weights, context.device)
    batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
    level = build_level(cfg, "pretrain", "pretrain", trunk, pretext, batches, pretrain_steps(context))
    seed_rank(cfg.train.seed)
    return Pretrain(level)
