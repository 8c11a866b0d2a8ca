"""Numbers that go wrong in a run: seen at the step, told with the batch that they came from, and dealt with."""

import logging
import math
import statistics
from collections import deque
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
from bissl_zoo.engine.trainer import HookBase, Trainer
from bissl_zoo.errors import BadHypergradient, NonFiniteLoss

logger = logging.getLogger(__name__)

#: a gradient norm that is so many times the median of the last WINDOW, of which there are LEAST, has exploded
EXPLOSION, WINDOW, LEAST = 1e4, 50, 10
#: deviation of the normalised embedding below which it has collapsed, see `normalized_std`
COLLAPSED = 0.01
#: hypergradients replaced by the plain gradient between two warnings of them
FALLBACKS_PER_WARNING = 100
#: tensors named in a message
NAMED = 5


class Guard:
    """Takes the steps of one level: tells more of what went wrong in one, and undoes it where the run is to go on.

    To undo is to drop the gradients and to put the buffers back, batch-norm statistics above all: parameters and the
    optimizer's state do not move before the numbers are known to be finite. An undone step counts in the schedule, and
    its batch is gone. What ends or undoes a step is raised on every process alike, and so is the decision.

    Args:
        undoes: whether to undo steps; otherwise the first one that fails ends the run.
        most: of the stage's steps that are undone.
    """

    def __init__(self, trainer: Trainer, level: Level, undoes: bool, most: int) -> None:
        self.trainer, self.level, self.undoes, self.most = trainer, level, undoes, most
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.warned = False
        self.last: tuple[int, dict[str, Any]] | None = None

    def __call__(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `step` returns; nothing where it was undone.

        Raises:
            NonFiniteLoss, BadHypergradient: of the step, with its samples and the last losses.
        """
        kept = self._buffers() if self.undoes else []
        try:
            metrics = step()
        except NonFiniteLoss as error:
            told = f"{error} {self._circumstances([self.level], error.rank)}"
            if not self.undoes:
                hint = "train.on_nonfinite=skip, also with --resume, leaves such steps out."
                raise NonFiniteLoss(f"{told} {hint}", error.rank) from error
            if self.trainer.skipped >= self.most:
                limit = f"{self.trainer.skipped} steps of {self.trainer.name} were skipped before, and"
                raise NonFiniteLoss(f"{told} {limit} train.max_skipped={self.most}.", error.rank) from error
            self._undo(kept)
            logger.warning(f"{told} The step is skipped, {self.trainer.skipped} of at most {self.most} in this stage.")
            return {}
        except BadHypergradient as error:
            # the newest batch of the lower level is the one that defines the curvature
            levels = list(self.trainer.levels().values())
            raise BadHypergradient(f"{error} {self._circumstances(levels)}") from error
        self._remember(metrics)
        return metrics

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        backbones = [level.backbone for level in self.trainer.levels().values()]  # an upper step moves the lower one's
        modules = {id(m): m for root in (*backbones, self.level.head) for m in root.modules()}.values()
        return [
            (module, name, buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def _undo(self, kept: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
        for module, name, buffer, before in kept:
            module._buffers[name] = buffer.copy_(before)
        self.level.optimizer.zero_grad(set_to_none=True)
        self.level.step += 1
        self.trainer.skipped += 1

    def _remember(self, metrics: dict[str, Any]) -> None:
        """Keep the losses for a message to come, and warn, once, of a gradient norm that has exploded."""
        level = self.level
        own = {name.removeprefix(f"{level.name}/"): v for name, v in metrics.items() if not name.startswith("solver/")}
        self.last = level.step - 1, {name: v for name, v in own.items() if isinstance(v, float) and name != "lr"}
        norm = own.get("grad_norm", 0.0)
        usual = statistics.median(self.norms) if len(self.norms) >= LEAST else math.inf
        if not self.warned and 0 < usual < norm / EXPLOSION:
            self.warned = True
            logger.warning(
                f"{level.name} level, step {level.step - 1}: the norm of the gradient before clipping is "
                f"{norm:.3g}, {norm / usual:.0f} times the median of the {len(self.norms)} steps before. "
                f"{describe_batch(level)} Lower the learning rate, or set clip_grad."
            )
        self.norms.append(norm)

    def _circumstances(self, levels: list[Level], rank: int | None = None) -> str:
        """The newest batches of these levels, and what the losses of this one were before."""
        told = [describe_batch(level, rank) for level in levels]
        last = all_gather_objects(self.last)[rank or 0]
        if last:
            step, losses = last
            figures = ", ".join(f"{name}={value:.4g}" for name, value in losses.items())
            told.append(f"Last finite figures, of step {step}: {figures}.")
        return " ".join(filter(None, told))


def describe_batch(level: Level, rank: int | None = None) -> str:
    """A sentence on a level's newest batch, its samples and their files; empty where the batches do not know.

    Args:
        rank: the process whose part is told of; None for all parts. Every process must ask.
    """
    batches = level.data_iterator
    if not isinstance(batches, Batches):
        return ""
    head = f"Batch {batches.taken - 1} of {level.name}"
    parts = all_gather_objects(batches.newest())
    if parts[0] is None:
        return f"{head} was read in a stream, and its samples have no numbers."
    numbers = parts[rank] if rank is not None else [number for part in parts for number in part]
    whose = f" on rank {rank}" if rank is not None and len(parts) > 1 else ""
    return f"{head}{whose} has {name_samples(numbers, batches.dataset)}."


class Health(HookBase):
    """Sets the guards of a stage's levels, and looks at what no single step shows.

    Every `train.log_period` steps, and before every checkpoint, the networks themselves: a teacher or a queue may hold
    a NaN that no loss has met yet. That ends the run, since no later step would mend it. Collapse is judged where
    `train.probe` measures it, and nowhere else, as it takes a pass of its own.
    """

    def __init__(self, cfg: DictConfig) -> None:
        settings = cfg.train
        self.periods = (settings.log_period, settings.checkpoint.period)
        self.undoes, self.most = settings.on_nonfinite == "skip", settings.max_skipped
        self.collapsed, self.warn_at = False, 1

    def before_train(self) -> None:
        """Set the guards; buffers that are infinite from the outset, such as masks, are left alone later."""
        for level in self.trainer.levels().values():
            level.guard = Guard(self.trainer, level, self.undoes, self.most)
        self.meant: dict[str, list[str]] = {}
        for what, tensors in self._watched().items():
            self.meant[what] = _not_finite({n: t for n, t in tensors.items() if not isinstance(t, nn.Parameter)})

    def after_step(self) -> None:
        """Count and look; placed before the writer and the checkpoint."""
        trainer = self.trainer
        if self.undoes:
            trainer.metrics["skipped"] = trainer.skipped
        self._tell_of_fallbacks(trainer.metrics.get("solver/fallbacks", 0))
        self._tell_of_collapse(trainer.metrics.get("probe/std", math.inf))
        if trainer.stopping or trainer.done or any(trainer.step % n == 0 for n in self.periods):
            for what, tensors in self._watched().items():
                self._refuse_non_finite(what, {n: t for n, t in tensors.items() if n not in self.meant[what]})

    def _watched(self) -> dict[str, dict[str, Tensor]]:
        """What is looked at, in words, with its tensors by name."""
        watched = {}
        for level in self.trainer.levels().values():
            parts = {"backbone": level.backbone, "head": level.head}
            watched[f"{level.name} level"] = {f"{part}.{n}": t for part, m in parts.items() for n, t in _floats(m)}
        return watched | {name: dict(_floats(module)) for name, module in self.trainer.averages().items()}

    def _tell_of_fallbacks(self, count: int) -> None:
        if count >= self.warn_at:
            self.warn_at = count + FALLBACKS_PER_WARNING
            logger.warning(
                f"the solver gave no usable hypergradient at {count} upper steps so far, which took the plain "
                "gradient v instead (bilevel.on_bad_hypergradient=plain); see solver/status and solver/residual."
            )

    def _tell_of_collapse(self, std: float) -> None:
        if std < COLLAPSED and not self.collapsed:
            self.collapsed = True
            logger.warning(
                f"the embedding has collapsed: its normalised deviation is {std:.2g}, where 0 is the same "
                f"answer to every image. Step {self.trainer.step} of {self.trainer.name}, as train.probe measures it."
            )

    @torch.no_grad()
    def _refuse_non_finite(self, what: str, tensors: dict[str, Tensor]) -> None:
        norm = get_total_norm(tensors.values())  # of all at once; what it makes of numbers too large is looked at again
        if not any_rank(not math.isfinite(norm), norm.device):
            return
        found = next(filter(None, all_gather_objects(_not_finite(tensors))), None)
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise NonFiniteLoss(
                f"{what}, after step {self.trainer.step} of {self.trainer.name}: NaN or infinite numbers "
                f"in {', '.join(found[:NAMED])}{more}, though the losses are finite. No later step mends that. "
                "Checkpoints are looked at in the same way before they are written, so --resume goes on from a sound "
                "one; where it comes to the same end, begin anew with a lower learning rate or a longer warm-up."
            )


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()]


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
