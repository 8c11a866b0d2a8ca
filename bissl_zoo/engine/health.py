"""Detect NaN or Inf in losses, gradients and weights, report the batch, and stop the run or undo the step."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import name_samples
from bissl_zoo.distributed import all_gather_objects, any_rank
from bissl_zoo.engine.build import Batches
from bissl_zoo.engine.trainer import Hook, Trainer
from bissl_zoo.errors import BadHypergradient, NonFiniteLoss, shorten

logger = logging.getLogger(__name__)

#: deviation of the normalised embedding below which it has collapsed, see `normalized_std`
COLLAPSED = 0.01
#: tensors named in a message
NAMED = 5


class Guard:
    """Run the steps of one level; report what went wrong in a step, and undo the step if the run is to continue.

    Undoing a step drops the gradients and restores the buffers, above all batch-norm statistics: parameters and the
    optimizer's state do not change before the numbers are known to be finite. An undone step counts in the schedule,
    and its batch is not used again. Errors and decisions are the same in every process.

    Args:
        undoes: undo steps that fail; if False, the first one ends the run.
        limit: steps of the stage that may be undone.
    """

    def __init__(self, trainer: Trainer, level: Level, undoes: bool, limit: int) -> None:
        self.trainer, self.level, self.undoes, self.limit = trainer, level, undoes, limit
        self.last: tuple[int, dict[str, Any]] | None = None

    def __call__(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the metrics of `step`, or an empty dict if it was undone.

        Raises:
            NonFiniteLoss, BadHypergradient: from the step, with its samples and the last losses.
        """
        saved = self._buffers() if self.undoes else []
        try:
            metrics = step()
        except NonFiniteLoss as error:
            message = f"{error} {self._circumstances([self.level], error.rank)}"
            if not self.undoes:
                hint = "train.on_nonfinite=skip, also with --resume, skips such steps."
                raise NonFiniteLoss(f"{message} {hint}", error.rank) from error
            if self.trainer.skipped >= self.limit:
                reached = f"{self.trainer.skipped} steps of {self.trainer.name} were skipped before, and"
                raise NonFiniteLoss(f"{message} {reached} train.max_skipped={self.limit}.", error.rank) from error
            self._undo(saved)
            logger.warning(
                f"{message} The step is skipped, {self.trainer.skipped} of at most {self.limit} in this stage."
            )
            return {}
        except BadHypergradient as error:
            # the newest batch of the lower level is the one of the curvature
            levels = list(self.trainer.levels().values())
            raise BadHypergradient(f"{error} {self._circumstances(levels)}") from error
        self._remember(metrics)
        return metrics

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        # of all backbones, since an upper step changes the lower one's
        backbones = [level.backbone for level in self.trainer.levels().values()]
        modules = {id(m): m for root in (*backbones, self.level.head) for m in root.modules()}.values()
        return [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def _undo(self, saved: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
        for module, name, buffer, before in saved:
            module._buffers[name] = buffer.copy_(before)
        self.level.optimizer.zero_grad(set_to_none=True)
        self.level.step += 1
        self.trainer.skipped += 1

    def _remember(self, metrics: dict[str, Any]) -> None:
        """Save the losses for a later message."""
        metrics = {k.removeprefix(f"{self.level.name}/"): v for k, v in metrics.items() if not k.startswith("solver/")}
        values = {name: v for name, v in metrics.items() if isinstance(v, float) and name != "lr"}
        self.last = self.level.step - 1, values

    def _circumstances(self, levels: list[Level], rank: int | None = None) -> str:
        """Describe the newest batches of `levels` and the last finite losses of this level."""
        parts = [describe_batch(level, rank) for level in levels]
        last = all_gather_objects(self.last)[rank or 0]
        if last:
            step, losses = last
            values = ", ".join(f"{name}={value:.4g}" for name, value in losses.items())
            parts.append(f"Last finite metrics, of step {step}: {values}.")
        return " ".join(filter(None, parts))


def describe_batch(level: Level, rank: int | None = None) -> str:
    """Return a sentence with the samples of a level's newest batch and their files; empty if they are unknown.

    Args:
        rank: the process whose part is described; None for all parts. A collective: every process must call it.
    """
    batches = level.data_iterator
    if not isinstance(batches, Batches):
        return ""
    title = f"Batch {batches.taken - 1} of {level.name}"
    parts = all_gather_objects(batches.newest())
    if parts[0] is None:
        return f"{title} was read in a stream, and its samples have no numbers."
    numbers = parts[rank] if rank is not None else [number for part in parts for number in part]
    whose = f" on rank {rank}" if rank is not None and len(parts) > 1 else ""
    return f"{title}{whose} has {name_samples(numbers, batches.dataset)}."


class Health(Hook):
    """Install the guards of a stage's levels, and check what no single step shows.

    Every `train.log_period` steps and before every checkpoint the networks are checked: a teacher or a queue may hold
    a NaN that no loss has read yet. That ends the run, since no later step removes it. Collapse is judged only where
    `train.probe` measures it.
    """

    def __init__(self, cfg: DictConfig) -> None:
        settings = cfg.train
        self.periods = (settings.log_period, settings.checkpoint.period)
        self.undoes, self.limit = settings.on_nonfinite == "skip", settings.max_skipped
        self.collapsed = False

    def before_train(self) -> None:
        """Install the guards; buffers that are infinite from the start, such as masks, are not checked later."""
        for level in self.trainer.levels().values():
            level.guard = Guard(self.trainer, level, self.undoes, self.limit)
        self.ignored: dict[str, list[str]] = {}
        for what, tensors in self._watched().items():
            self.ignored[what] = _not_finite({n: t for n, t in tensors.items() if not isinstance(t, nn.Parameter)})

    def after_step(self) -> None:
        """Count skipped steps and check the networks; runs before the writer and the checkpoint."""
        trainer = self.trainer
        if self.undoes:
            trainer.metrics["skipped"] = trainer.skipped
        self._warn_about_collapse(trainer.metrics.get("probe/std", math.inf))
        if trainer.stopping or trainer.done or any(trainer.step % n == 0 for n in self.periods):
            for what, tensors in self._watched().items():
                self._refuse_non_finite(what, {n: t for n, t in tensors.items() if n not in self.ignored[what]})

    def _watched(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors that are checked, by owner and name."""
        watched = {}
        for level in self.trainer.levels().values():
            parts = {"backbone": level.backbone, "head": level.head}
            watched[f"{level.name} level"] = {f"{part}.{n}": t for part, m in parts.items() for n, t in _floats(m)}
        return watched

    def _warn_about_collapse(self, std: float) -> None:
        if std < COLLAPSED and not self.collapsed:
            self.collapsed = True
            logger.warning(
                f"the embedding has collapsed: its normalised deviation is {std:.2g}, and 0 is the same embedding for "
                f"every image. Step {self.trainer.step} of {self.trainer.name}, measured by train.probe."
            )

    @torch.no_grad()
    def _refuse_non_finite(self, what: str, tensors: dict[str, Tensor]) -> None:
        norm = get_total_norm(tensors.values())  # one pass; it may overflow, so each tensor is checked again below
        if not any_rank(not math.isfinite(norm), norm.device):
            return
        names = next(filter(None, all_gather_objects(_not_finite(tensors))), None)
        if names:
            raise NonFiniteLoss(
                f"{what}, after step {self.trainer.step} of {self.trainer.name}: NaN or Inf in {shorten(names, NAMED)} "
                "although the losses are finite. Checkpoints are checked before they are written, so --resume starts "
                "from a valid one. If it fails again, start a new run with a lower learning rate or a longer warm-up."
            )


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()]


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
