"""The finetune stage, which trains and evaluates on the downstream task, and the teacher that labels images for it.

Pseudo-labels as in Lee (ICML 2013 workshop) and, for a teacher whose student starts again from the pretrained weights,
Xie et al., "Noisy Student" (arXiv 1911.04252).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.data import Dataset

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import to_device
from bissl_zoo.distributed import get_world_size, on_main_process
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import build_downstream, build_level, build_part, skips_undecodable, train_batches
from bissl_zoo.engine.evaluate import metric_names
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.stages.bissl import HEAD_WARMUP
from bissl_zoo.engine.trainer import Context, SingleLevelTrainer, Stage, Weights, load_state
from bissl_zoo.errors import ConfigError, DatasetError, did_you_mean
from bissl_zoo.registry import STAGES

logger = logging.getLogger(__name__)

#: the fine-tuning from the backbone that entered the stage before
BASELINE = "finetune_pretrained"


class FinetuneTrainer(SingleLevelTrainer):
    """Train backbone and task head on the downstream task.

    Args:
        l2_sp: strength of a pull of the backbone towards the weights it has now (Li et al., "L2-SP", arXiv 1802.01483).

    Attributes:
        best: the weights that were best on the validation set, with their `step`, the metric's `value` and the number
            of evaluations `since`; None before the first evaluation.
    """

    def __init__(self, level: Level, l2_sp: float | None = None) -> None:
        super().__init__(level)
        self.best: dict[str, Any] | None = None
        self.l2_sp = l2_sp
        self.anchor = [p.detach().clone() for p in level.backbone_parameters] if l2_sp else []

    def adjust_gradients(self) -> None:
        """Add the gradient of `l2_sp / 2 * ||theta - theta_start||^2` of the trained backbone parameters."""
        if not self.l2_sp:
            return
        for parameter, anchor in zip(self.level.backbone_parameters, self.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self.l2_sp)

    def remember(self, value: float) -> None:
        """Save a copy of the current weights as the best so far."""
        weights = {part: _copy(module) for part, module in self._parts().items()}
        self.best = {"step": self.step, "value": value, "since": 0, "weights": weights}

    def take_best(self) -> None:
        """Load the best weights, if there are any."""
        for part, module in self._parts().items() if self.best else ():
            load_state(module, self.best["weights"][part], f"best {part}")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the level, and the best weights."""
        return {**super().state_dict(), **({"best": self.best} if self.best else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            CheckpointError: the state belongs to another architecture.
        """
        super().load_state_dict(state)
        self.best = state.get("best")

    def _parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.level.backbone, "head": self.level.head}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@STAGES.register("finetune")
class Finetune(Stage):
    """Fine-tune from a backbone; reads `finetune` of the config.

    Args:
        start: the label of the backbone, for the results.
        baseline: fine-tune from the backbone that entered the stage before, for comparison.
    """

    name = "finetune"
    data_roles = ("train", "val", "test")
    optimizers = ("finetune",)
    section, epoch_role = "finetune", "train"
    follows = ("pretrain", "bissl")
    evaluates = True
    purpose = "train backbone and head on the labelled images"

    def __init__(self, start: str | None = "init", baseline: bool = False) -> None:
        self.start, self.baseline = start, baseline
        if baseline:
            self.name, self.purpose = BASELINE, f"{self.purpose}, without the BiSSL stage"

    def expand(self, context: Context, earlier: Sequence[Stage]) -> list[Stage]:
        """Return the stage, after its baseline if `finetune.baseline` is True and a stage with such a baseline ran."""
        last = next((stage for stage in reversed(earlier) if stage.label), None)
        if last is None:
            return [self]
        self.start = last.label
        if not (context.cfg.finetune.baseline and last.baseline_label):
            return [self]
        return [type(self)(last.baseline_label, baseline=True), self]

    def needs(self, context: Context) -> Mapping[str, str]:
        """Return the warm-up of the head if the stage starts from a trained one."""
        return {"task": HEAD_WARMUP} if context.cfg.finetune.head == "warm" else {}

    def check(self, context: Context, weights: Weights) -> None:
        """Check the optimizer's parameter groups and the metric of early stopping."""
        cfg = context.cfg
        if self.baseline:
            return
        trunk, task = build_downstream(context, Weights(weights.backbone))
        build_part(cfg.optimizer.finetune, params=trained_parameters(cfg, trunk, task))
        metric = cfg.finetune.early_stopping.metric
        names = metric_names(context, trunk, task, "val") if metric else ()
        if metric and metric not in names:
            raise ConfigError(
                f"finetune.early_stopping.metric is '{metric}', which the task '{cfg.task.name}' does not measure."
                f"{did_you_mean(metric, names)} Its metrics: {', '.join(name for name in names if '/' not in name)}."
            )

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> FinetuneTrainer:
        """Return the trainer from a backbone and a new head; baseline and fine-tuning get equal heads and batches."""
        cfg = context.cfg
        source = weights.previous or weights if self.baseline else weights
        seed_everything(cfg.train.seed + 2)
        head = source.task if cfg.finetune.head == "warm" else None
        trunk, task = build_downstream(context, Weights(source.backbone, task=head))
        if weights.teacher is not None:
            context = with_pseudo_labels(context, weights.teacher)
        if cfg.finetune.sync_batch_norm and get_world_size() > 1 and context.device.type == "cuda":
            trunk, task = map(nn.SyncBatchNorm.convert_sync_batchnorm, (trunk, task))
        batches = train_batches(context, task, cfg.train.seed + 2, start_step)
        groups = trained_parameters(cfg, trunk, task)
        level = build_level(cfg, self.name, "finetune", trunk, task, batches, self.steps(context), groups=groups)
        seed_rank(cfg.train.seed + 2)
        return FinetuneTrainer(level, cfg.finetune.l2_sp)


def trained_parameters(cfg: DictConfig, trunk: Backbone, task: DownstreamTask) -> list[Any]:
    """Freeze the backbone up to `finetune.freeze_at` and return the parameters for the stage's optimizer.

    With `finetune.layer_decay` they are groups, each with its learning rate.

    Raises:
        ConfigError: timm does not define layers for the backbone, or the optimizer has no learning rate.
        SplitError: the backbone has no stage of that name.
    """
    settings = cfg.finetune
    if settings.freeze_at:
        trunk.freeze(settings.freeze_at)
    trained = [p for module in (trunk, task) for p in module.parameters() if p.requires_grad]
    if settings.layer_decay is None:
        return trained
    if not hasattr(trunk.model, "group_matcher"):
        raise ConfigError(f"finetune.layer_decay: timm defines no layers for '{trunk.name}'. Set it to null.")
    rate = cfg.optimizer.finetune.get("lr")
    if rate is None:
        raise ConfigError("finetune.layer_decay needs optimizer.finetune.lr, the rate of the task's head.")
    groups = [{"params": [p for p in task.parameters() if p.requires_grad], "lr": rate}]
    names = group_parameters(trunk.model, trunk.model.group_matcher(coarse=False))
    parameters = dict(trunk.model.named_parameters())
    for depth, layer in enumerate(sorted(names, reverse=True), start=1):
        members = [parameters[name] for name in names[layer] if parameters[name].requires_grad]
        if members:
            groups.append({"params": members, "lr": rate * settings.layer_decay**depth})
    return groups


class TeacherTrainer(FinetuneTrainer):
    """Fine-tune a teacher; the result is the weights that entered the stage, and the teacher."""

    def __init__(self, level: Level, l2_sp: float | None, entered: Weights) -> None:
        super().__init__(level, l2_sp)
        self.entered = entered

    def result(self) -> Weights:
        """Return the weights that entered the stage, with the teacher."""
        teacher = Weights(self.level.backbone.state_dict(), task=self.level.head.state_dict())
        return replace(self.entered, teacher=teacher)


@STAGES.register("teacher")
class Teacher(Finetune):
    """Fine-tune on the labelled images alone, with the settings of `finetune`, to label the unlabelled images."""

    name = "teacher"
    data_roles = ("pretext", "train")
    evaluates = False
    purpose = "train a teacher on the labelled images, which then labels the others"

    def build(self, context: Context, weights: Weights, start_step: int = 0) -> TeacherTrainer:
        """Return the trainer of the teacher."""
        if hasattr(context.data["pretext"], "stream"):
            raise ConfigError("The stage 'teacher' labels single images; dataloader.pretext cannot be a set of shards.")
        trainer = super().build(context, weights, start_step)
        return TeacherTrainer(trainer.level, trainer.l2_sp, weights)


class WithPseudoLabels(Dataset):
    """The labelled samples, repeated to the number of the pseudo-labelled ones if there are more of these.

    Args:
        labelled: data set of `(image, target)`.
        pile: data set of `(image, anything)`.
        targets: pseudo-labels of samples of the pile by their number.
    """

    def __init__(self, labelled: Dataset, pile: Dataset, targets: dict[int, Any]) -> None:
        self.labelled, self.pile, self.classes = labelled, pile, labelled.classes
        self.numbers, self.targets = list(targets), list(targets.values())

    def __len__(self) -> int:
        return len(self.numbers) + max(len(self.numbers), len(self.labelled))

    def __getitem__(self, index: int) -> Any:
        if index < len(self.numbers):
            return self.pile[self.numbers[index]][0], self.targets[index]
        return self.labelled[(index - len(self.numbers)) % len(self.labelled)]


def with_pseudo_labels(context: Context, teacher: Weights) -> Context:
    """Return the context with a training set that includes the images that the teacher labels.

    Raises:
        DatasetError: no prediction reaches `finetune.pseudo_threshold`, or the task has no pseudo-labels.
    """
    threshold, pile = context.cfg.finetune.pseudo_threshold, context.data["pretext"]
    backbone, task = build_downstream(context, teacher)
    with torch.random.fork_rng(), evaluating(backbone, task):
        targets = on_main_process(lambda: _pseudo_targets(context, backbone, task, pile, threshold))
    if not targets:
        raise DatasetError(
            f"The teacher labels none of the {len(pile)} unlabelled images with a score of {threshold} or more. Lower "
            "finetune.pseudo_threshold, or train the teacher longer."
        )
    logger.info(f"pseudo-labels: {len(targets)} of {len(pile)} images, threshold {threshold}")
    return replace(context, data={**context.data, "train": WithPseudoLabels(context.data["train"], pile, targets)})


def _pseudo_targets(
    context: Context, backbone: Backbone, task: DownstreamTask, pile: Dataset, threshold: float
) -> dict[int, Any]:
    transform, size = task.transform(train=False), context.cfg.dataloader.test.batch_size
    skips, targets = skips_undecodable(context.cfg, "pretext"), {}
    for start in range(0, len(pile), size):
        samples, numbers = [], []
        for number in range(start, min(start + size, len(pile))):
            try:
                image = pile[number][0]
            except DatasetError:
                if not skips:
                    raise
                continue
            samples.append(transform(image, task.blank_target(image.size)))
            numbers.append(number)
        if not samples:
            continue
        images, _ = task.collate(samples)
        predictions = to_device(task.predict(backbone, to_device(images, context.device)), torch.device("cpu"))
        for number, prediction in zip(numbers, predictions, strict=True):
            if (target := task.pseudo_target(prediction, threshold)) is not None:
                targets[number] = target
    return targets
