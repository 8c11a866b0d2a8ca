"""The hook that measures, while a pretext method learns, what its embedding is worth and whether it collapses."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.backbones import evaluating
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import get_world_size, on_main_process
from bissl_zoo.engine.bad_images import Readable
from bissl_zoo.engine.build import Context, build_datasets
from bissl_zoo.engine.features import (
    CentralCrops,
    FixedViews,
    drawn,
    extract_features,
    own_randomness,
    pretext_pixels,
)
from bissl_zoo.engine.trainer import HookBase, Trainer
from bissl_zoo.errors import DatasetError
from bissl_zoo.evaluation import collapse_figures, knn_accuracy, linear_probe
from bissl_zoo.progress.display import say
from bissl_zoo.registry import DOWNSTREAM_TASKS

#: the stages that train a pretext method, and which of their levels does
PROBED = {"pretrain": "level", "bissl": "lower"}

#: passes over the features, enough for a few thousand of them
LINEAR_EPOCHS = 30


class _Asked(Exception):
    """The run is to stop while it measures."""


class Probe(HookBase):
    """Every `period` steps and after the last, figures of the pretext embedding; they join the metrics as `probe/...`.

    The seconds that this takes join them as `time/probe`.

    The embedding is the whole backbone's, trunk and tail, as the pretext method embeds, in eval mode and float32.
    Collapse monitors compare two fixed views of pretext images. Where there are labelled sets, a kNN classifier has
    images of `train` as neighbours and is asked about images of `test`; so is a linear one, which is trained on them.

    The run goes on as if nothing had been measured: random states, modes and batch-norm statistics are as before. Of
    several processes rank 0 measures while the others wait, since it is rank 0's batch-norm statistics that
    checkpoints hold, and no collective runs within.

    Args:
        images: most images of each set, drawn with `seed`; see :class:`Readable` for those that cannot be read.
        labelled: `train` and `test`; None for the monitors alone.
        asked: after every batch, whether this process is to stop, and to measure when it goes on.
    """

    def __init__(
        self,
        level: Level,
        context: Context,
        labelled: dict[str, Dataset] | None,
        period: int,
        images: int,
        k: int,
        linear: bool,
        seed: int,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.level, self.context, self.labelled = level, context, labelled
        self.period, self.images, self.k, self.linear, self.seed = period, images, k, linear, seed
        self.asked = asked

    def after_step(self) -> None:
        """Measure when it is due; placed before the writer, so that the figures are written with this step."""
        trainer = self.trainer
        if trainer.step % self.period and not trainer.done:
            return
        start = time.perf_counter()
        measured = on_main_process(self._measure_unless_asked)
        if measured is None:
            return trainer.postpone()
        figures, line = measured
        trainer.metrics.update({f"probe/{name}": value for name, value in figures.items()})
        trainer.metrics["time/probe"] = time.perf_counter() - start
        say(f"[{trainer.name} {trainer.step}/{trainer.total_steps}] probe  {line}", "figures")

    def _measure_unless_asked(self) -> tuple[dict[str, float], str] | None:
        try:
            return self._measure()
        except _Asked:
            return None

    def _measure(self) -> tuple[dict[str, float], str]:
        """The figures, and the line that tells of them."""
        level = self.level
        with own_randomness(self.context.device), evaluating(level.backbone, level.head):
            samples = FixedViews(*self._drawn(self.context.data["pretext"], "pretext"), level.head.views(), self.seed)
            size = samples[0][0].shape[-1]
            first, second = self._features(samples, "pretext")
            if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                return {"effective_rank": math.nan}, "the embedding is not finite in eval mode"
            figures = collapse_figures(first, second)
            rank = f"effective rank {figures['effective_rank']:.1f}/{min(first.shape)}  std {figures['std']:.2f}"
            if self.labelled is None:
                return figures, rank
            parts = self._labelled_features(size)
        top1 = {"knn": knn_accuracy(*parts, k=self.k)["top1"]}
        line = f"kNN top-1 {top1['knn']:.3f} (k={self.k}, {len(parts[0])} images)"
        if self.linear:
            top1["linear"] = linear_probe(*parts, epochs=LINEAR_EPOCHS, seed=self.seed).metrics["top1"]
            line += f"  linear top-1 {top1['linear']:.3f}"
        return {**{f"{name}_top1": value for name, value in top1.items()}, **figures}, f"{line}  {rank}"

    def _labelled_features(self, size: int) -> list[torch.Tensor]:
        pixels = pretext_pixels(self.context.cfg)
        parts = []
        for role, dataset in self.labelled.items():
            samples = CentralCrops(*self._drawn(dataset, role), size, pixels["mean"], pixels["std"])
            parts += self._features(samples, role)
        return parts

    def _drawn(self, dataset: Dataset, role: str) -> tuple[Dataset, list[int]]:
        return Readable(dataset, self.context.cfg, role), drawn(len(dataset), self.images, self.seed)

    def _features(self, samples: Dataset, role: str) -> tuple[torch.Tensor, ...]:
        def embed(images: Tensor) -> Tensor:
            if self.asked():
                raise _Asked
            return self.level.head.embed(self.level.backbone, images)

        loaders = self.context.cfg.dataloader
        return extract_features(
            embed,
            samples,
            self.context.device,
            max(1, loaders.pretext.batch_size // get_world_size()),  # what training, which needs more memory, takes
            loaders[role].get("num_workers", 0),
        )


def build_probe(context: Context, trainer: Trainer, asked: Callable[[], bool] = lambda: False) -> Probe | None:
    """The hook as `train.probe` describes it; None where it is off, or the stage trains no pretext method.

    Raises:
        DatasetError: labels are to be had, and their sets, which this stage alone would not read, are missing.
    """
    settings = context.cfg.train.probe
    if not settings.period or trainer.name not in PROBED:
        return None
    level = trainer.levels()[PROBED[trainer.name]]
    labelled = _labelled(context) if settings.k else None
    figures = (settings.period, settings.images, settings.k, settings.linear)
    return Probe(level, context, labelled, *figures, seed=context.cfg.train.seed, asked=asked)


def _labelled(context: Context) -> dict[str, Dataset] | None:
    """The sets `train` and `test` where the config's task is of classes, opened where the run has not."""
    cfg, roles = context.cfg, ("train", "test")
    classes = getattr(DOWNSTREAM_TASKS.get(cfg.task.name), "target_type", None) is int
    if not classes or not all(role in cfg.dataloader for role in roles):
        return None
    try:
        data = context.data if set(roles) <= context.data.keys() else build_datasets(cfg, set(roles))
    except DatasetError as error:
        raise DatasetError(
            f"{error}\nIt is train.probe that asks for it, to measure kNN; train.probe.k=0 leaves that out."
        ) from error
    if not all(isinstance(Readable(data[role], cfg, role)[0][1], int) for role in roles):
        return None
    return {role: data[role] for role in roles}
