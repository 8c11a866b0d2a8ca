"""A level: a backbone, a head, and how they are trained. BiSSL has two levels, every other stage one."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bissl_zoo.distributed import all_gather_objects, maximum_over_ranks
from bissl_zoo.errors import NonFiniteLoss
from bissl_zoo.optim import LRMultiplier, clip_gradients, set_learning_rate

ADVICE = "Lower the learning rate, lengthen the warm-up, or inspect the inputs of this step."


@dataclass
class Level:
    """A backbone, a head on it, and how they are trained.

    Attributes:
        name: `lower`, `upper`, or the name of a stage with a single level; used in messages and metrics.
        backbone: module that maps images to feature maps.
        head: module with `losses(backbone, batch) -> dict[str, Tensor]`.
        optimizer: optimizer of :attr:`parameters`.
        data_iterator: endless iterator of batches for `head.losses`.
        lr_scheduler: factor on the learning rate as a function of the step.
        total_steps: length of the learning-rate schedule in optimizer steps.
        clip_norm: limit of the global gradient norm; None for no limit.
        amp_dtype: autocast dtype of losses that are differentiated once; None for full precision.
        batch_size: images per batch over all ranks, for throughput metrics; 0 if unknown.
        guard: calls a step and returns its metrics, or an empty dict if it undid the step; None for no guard.
        step: number of optimizer steps, including undone ones.
        images: number of images read from `data_iterator` since the process started, over all ranks.
        data_time: seconds spent waiting for batches.
    """

    name: str
    backbone: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    data_iterator: Iterator[Any]
    lr_scheduler: LRMultiplier
    total_steps: int
    clip_norm: float | None = 10.0
    amp_dtype: torch.dtype | None = None
    batch_size: int = 0
    guard: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]] | None = None
    step: int = 0
    images: int = 0
    data_time: float = 0.0

    def next_batch(self) -> Any:
        """Return the next batch and add the time it takes to `data_time`."""
        start = time.perf_counter()
        batch = next(self.data_iterator)
        self.data_time += time.perf_counter() - start
        self.images += self.batch_size
        return batch

    @property
    def backbone_parameters(self) -> list[Tensor]:
        """Trained parameters of the backbone, equal in both levels, in the order of a flat `(P,)` vector."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    @property
    def head_parameters(self) -> list[Tensor]:
        """Trained parameters of the head."""
        return [p for p in self.head.parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[Tensor]:
        """Trained parameters of backbone and head."""
        return self.backbone_parameters + self.head_parameters

    def attempt(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Call `step`, a step of this level, through the guard if there is one; return its metrics."""
        return self.guard(step) if self.guard else step()

    def loss(self, backbone: nn.Module, batch: Any, amp: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss of the head on `backbone`, with its graph, and the terms by name, without graphs.

        Args:
            backbone: the backbone of either level.
            batch: a batch of this level's data.
            amp: compute in `amp_dtype`; False for a loss that is differentiated twice.
        """
        device = next(backbone.parameters()).device.type
        with torch.autocast(device, self.amp_dtype, enabled=amp and self.amp_dtype is not None):
            losses = self.head.losses(backbone, batch)
        total = torch.stack(list(losses.values())).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def checked(self, losses: Mapping[str, Tensor], norm: Tensor, **others: Tensor) -> dict[str, float]:
        """Return `total_loss`, the losses, `others` and `grad_norm` as numbers, transferred to the host at once.

        Args:
            losses: terms of the loss by name.
            norm: norm of the loss's gradient, equal on all ranks.
        Raises:
            NonFiniteLoss: a loss is not finite on some rank, or the norm is not; names the level, step and losses.
        """
        values = torch.stack([*losses.values(), *others.values(), norm])
        bad = values[: len(losses)].isfinite().all().logical_not().to(values.dtype)
        *numbers, failed = torch.cat([values, bad[None], maximum_over_ranks(bad.clone())[None]]).tolist()
        bad, terms = numbers.pop(), dict(zip(losses, numbers, strict=False))
        if failed:
            report = ", ".join(f"{name}={value:g}" for name, value in terms.items()) if bad else None
            rank, report = next((r, text) for r, text in enumerate(all_gather_objects(report)) if text)
            raise NonFiniteLoss(
                f"{self.name} level, step {self.step}, rank {rank}: the loss is not finite ({report}). {ADVICE}", rank
            )
        if not math.isfinite(numbers[-1]):
            where = f"{self.name} level, step {self.step}"
            raise NonFiniteLoss(f"{where}: the loss is finite but the norm of its gradient is {numbers[-1]}. {ADVICE}")
        names = (*losses, *others, "grad_norm")
        return {**({"total_loss": sum(terms.values())} if terms else {}), **dict(zip(names, numbers, strict=True))}

    def optimize(self, losses: Mapping[str, Tensor] | None = None, **others: Tensor) -> dict[str, float]:
        """Clip the gradients, set the learning rate and take an optimizer step.

        Returns:
            The numbers of :meth:`checked` and `lr`.
        Raises:
            NonFiniteLoss: a loss or a gradient is not finite; the parameters are unchanged.
        """
        metrics = self.checked(losses or {}, clip_gradients(self.parameters, self.clip_norm), **others)
        lr = set_learning_rate(self.optimizer, self.lr_scheduler(self.step, self.total_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {**metrics, "lr": lr}
