"""The finetune stage: train backbone and a new head on the downstream task, and evaluate on the test set."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from timm.models import group_parameters
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import get_world_size
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import build_downstream, build_level, build_part, train_batches
from bissl_zoo.engine.evaluate import metric_names
from bissl_zoo.engine.pseudo_labels import with_pseudo_labels
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.stages.bissl import HEAD_WARMUP
from bissl_zoo.engine.trainer import Context, SingleLevelTrainer, Stage, Weights, load_state
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.registry import STAGES

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
