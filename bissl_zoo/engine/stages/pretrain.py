"""The pretrain stage: the pretext objective alone, on unlabelled images."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.distributed import get_world_size
from bissl_zoo.engine.build import build_level, build_pretext, pretext_batches
from bissl_zoo.engine.resume import seed_everything, seed_rank
from bissl_zoo.engine.trainer import Context, SingleLevelTrainer, Stage, Weights
from bissl_zoo.errors import ConfigError
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS, STAGES


class PretrainTrainer(SingleLevelTrainer):
    """Train trunk, tail and pretext head on unlabelled images."""

    def take_step(self) -> dict[str, Any]:
        """Take one step, then update the teacher of a method that has one."""
        metrics = super().take_step()
        self.level.head.after_step(self.level.backbone)
        return metrics

    def result(self) -> Weights:
        """Return the pretrained trunk and pretext head."""
        return Weights(backbone=self.level.backbone.state_dict(), pretext=self.level.head.state_dict())


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
    purpose = "train the backbone on the unlabelled images"

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
        batches = pretext_batches(context, pretext, cfg.train.seed, start_step)
        level = build_level(cfg, self.name, self.name, trunk, pretext, batches, self.steps(context))
        trainer = PretrainTrainer(level, settings.accumulate)
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
