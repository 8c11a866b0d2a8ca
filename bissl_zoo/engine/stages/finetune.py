"""The finetune stage: backbone and a new head are trained on the downstream task."""

from typing import Any

from omegaconf import DictConfig
from timm.models import group_parameters
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone
from bissl_zoo.bilevel.level import Level
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import (
    Context,
    Weights,
    build_downstream,
    build_level,
    count_steps,
    seed_everything,
    seed_rank,
    train_batches,
)
from bissl_zoo.engine.trainer import SingleLevelTrainer, load_state
from bissl_zoo.errors import ConfigError

#: the fine-tuning from the backbone that entered the BiSSL stage
BASELINE = "finetune_pretrained"


class Finetune(SingleLevelTrainer):
    """Train backbone and task head on the downstream task.

    Attributes:
        best: the weights that were best on validation data, with their `step`, the `value` and the number of
            evaluations `since`; None where nobody remembers any.
    """

    def __init__(self, level: Level) -> None:
        super().__init__(level)
        self.best: dict[str, Any] | None = None

    def remember(self, value: float) -> None:
        """The present weights are the best so far."""
        weights = {part: _copy(module) for part, module in self._parts().items()}
        self.best = {"step": self.step, "value": value, "since": 0, "weights": weights}

    def take_best(self) -> None:
        """Go back to the best weights, where some are remembered."""
        for part, module in self._parts().items() if self.best else ():
            load_state(module, self.best["weights"][part], f"best {part}")

    def state_dict(self) -> dict[str, Any]:
        """The level, and the best weights where there are some."""
        return {**super().state_dict(), **({"best": self.best} if self.best else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another architecture.
        """
        super().load_state_dict(state)
        self.best = state.get("best")

    def result(self) -> Weights:
        """The fine-tuned trunk and its head."""
        return Weights(backbone=self.level.backbone.state_dict(), task=self.level.head.state_dict())

    def _parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.level.backbone, "head": self.level.head}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


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
    groups = trained_parameters(cfg, trunk, task)
    level = build_level(cfg, name, "finetune", trunk, task, batches, finetune_steps(context), groups=groups)
    seed_rank(cfg.train.seed + 2)
    return Finetune(level)


def trained_parameters(cfg: DictConfig, trunk: Backbone, task: DownstreamTask) -> list[Any]:
    """What the stage's optimizer is given: the parameters, in groups with a learning rate each where rates decay.

    What `finetune.freeze_at` excludes is frozen here.

    Raises:
        ConfigError: the backbone does not say what its layers are, or the optimizer has no learning rate to scale.
        SplitError: it has no stage of that name.
    """
    settings = cfg.finetune
    if settings.freeze_at:
        trunk.freeze(settings.freeze_at)
    trained = [p for module in (trunk, task) for p in module.parameters() if p.requires_grad]
    if settings.layer_decay is None:
        return trained
    if not hasattr(trunk.model, "group_matcher"):
        raise ConfigError(
            f"finetune.layer_decay: timm's '{trunk.name}' does not say which its layers are. Set it to null."
        )
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
