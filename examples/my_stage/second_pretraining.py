"""A stage that continues pretraining with the optimizer of the lower level, and a hook that logs the learning rate."""

import logging

from bissl_zoo.engine.build import build_level, build_pretext, pretext_batches
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.stages.pretrain import PretrainTrainer
from bissl_zoo.engine.trainer import Context, Hook, Stage, Weights
from bissl_zoo.registry import STAGES

logger = logging.getLogger("bissl_zoo.my_stage")


@STAGES.register("second_pretraining")
class SecondPretraining(Stage):
    """Continue pretraining; reads `pretrain` of the config and `lower` of its optimizers."""

    name = "second_pretraining"
    data_roles = ("pretext",)
    optimizers = ("lower",)
    section, epoch_role = "pretrain", "pretext"
    provides = ("backbone", "pretext")
    follows = ("pretrain",)
    label = "pretrained twice"

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> PretrainTrainer:
        """Return the trainer of trunk, tail and pretext head."""
        cfg = context.cfg
        seed_everything(cfg.train.seed + 3)
        trunk, pretext = build_pretext(cfg, weights, context.device)
        batches = pretext_batches(context, pretext, cfg.train.seed + 3, start_step)
        level = build_level(cfg, self.name, "lower", trunk, pretext, batches, self.steps(context))
        seed_rank(cfg.train.seed + 3)
        return PretrainTrainer(level)


class LogLearningRate(Hook):
    """Log the learning rate every `period` steps, and count the steps of this process in the metrics."""

    def __init__(self, period: int) -> None:
        self.period, self.started = period, 0

    def before_step(self) -> None:
        """Count the step."""
        self.started += 1

    def after_step(self) -> None:
        """Add the count to the metrics and log the learning rate if it is due."""
        self.trainer.metrics["started"] = self.started
        if self.trainer.step % self.period == 0:
            rates = {name: level.optimizer.param_groups[0]["lr"] for name, level in self.trainer.levels().items()}
            logger.info(f"[{self.trainer.name} {self.trainer.step}] learning rates {rates}")
