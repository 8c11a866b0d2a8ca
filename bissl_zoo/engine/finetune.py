"""The finetune stage and evaluation: backbone and a new head are trained, then measured on the test set."""

from collections.abc import Callable

import torch

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.batches import to_device
from bissl_zoo.distributed import any_rank, broadcast_module
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import (
    Context,
    Weights,
    build_downstream,
    build_level,
    count_steps,
    seed_everything,
    seed_rank,
    test_loader,
    train_batches,
)
from bissl_zoo.engine.trainer import SingleLevelTrainer

#: the fine-tuning from the backbone that entered the BiSSL stage
BASELINE = "finetune_pretrained"


class Finetune(SingleLevelTrainer):
    """Train backbone and task head on the downstream task."""

    def result(self) -> Weights:
        """The fine-tuned trunk and its head."""
        return Weights(backbone=self.level.backbone.state_dict(), task=self.level.head.state_dict())


def finetune_steps(context: Context) -> int:
    """Optimizer steps of the stage."""
    cfg = context.cfg
    return count_steps(cfg.finetune, "finetune", context.data["train"], cfg.dataloader.train.batch_size)


def build_finetune(context: Context, weights: Weights, start_step: int = 0, name: str = "finetune") -> Finetune:
    """The stage from `weights.backbone` and a new head; two of the same seed get the same head and the same batches."""
    cfg = context.cfg
    seed_everything(cfg.train.seed + 2)
    trunk, task = build_downstream(context, Weights(weights.backbone))
    batches = train_batches(context, task, cfg.train.seed + 2, start_step)
    level = build_level(cfg, name, "finetune", trunk, task, batches, finetune_steps(context))
    seed_rank(cfg.train.seed + 2)
    return Finetune(level)


def evaluate(
    context: Context, backbone: Backbone, task: DownstreamTask, asked: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The task's figures over the whole test set, every rank's part included; the training modes are put back.

    Args:
        asked: after every batch, whether this process is to stop; where one is, the result is None on all of them.
    """
    modes = [(module, module.training) for module in (backbone, task)]
    for module, _ in modes:
        broadcast_module(module)  # ranks hold their own batch-norm statistics
        module.eval()
    evaluator = task.evaluator()
    evaluator.reset()
    with torch.random.fork_rng():
        for images, targets in test_loader(context, task):
            predictions = task.predict(backbone, to_device(images, context.device))
            evaluator.process(to_device(predictions, torch.device("cpu")), targets)
            if asked():
                break
    for module, training in modes:
        module.train(training)
    if any_rank(asked(), context.device):
        return None
    evaluator.synchronize()
    return evaluator.evaluate()
