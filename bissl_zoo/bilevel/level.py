"""A level: a backbone, a head, and how they are trained. BiSSL has two levels, every other stage one."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bissl_zoo.distributed import all_gather_objects, any_rank
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

    def loss(
        self, backbone: nn.Module, batch: Any, amp: bool = True, check: bool = True
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the total loss of the head on `backbone`, with its graph, and the terms by name as numbers.

        Args:
            backbone: the backbone of either level.
            batch: a batch of this level's data.
            amp: compute in `amp_dtype`; False for a loss that is differentiated twice.
            check: raise an error for losses that are not finite.
        Raises:
            NonFiniteLoss: a loss is not finite on some rank; names the level, the step and the losses.
        """
        device = next(backbone.parameters()).device.type
        with torch.autocast(device, self.amp_dtype, enabled=amp and self.amp_dtype is not None):
            losses = self.head.losses(backbone, batch)
        total = torch.stack(list(losses.values())).sum()
        values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist(), strict=True))
        bad = not all(math.isfinite(value) for value in values.values())
        if check and any_rank(bad, total.device):
            terms = ", ".join(f"{name}={value:g}" for name, value in values.items()) if bad else None
            rank, terms = next((r, failed) for r, failed in enumerate(all_gather_objects(terms)) if failed)
            raise NonFiniteLoss(
                f"{self.name} level, step {self.step}, rank {rank}: the loss is not finite ({terms}). {ADVICE}", rank
            )
        return total, values

    def check_gradient(self, norm: float) -> float:
        """Return `norm`, the norm of a gradient of this level's loss.

        Raises:
            NonFiniteLoss: the norm is not finite.
        """
        if not math.isfinite(norm):
            where = f"{self.name} level, step {self.step}"
            raise NonFiniteLoss(f"{where}: the loss is finite but the norm of its gradient is {norm}. {ADVICE}")
        return norm

    def optimize(self) -> dict[str, float]:
        """Clip the gradients, set the learning rate and take an optimizer step; return `lr` and `grad_norm`.

        Raises:
            NonFiniteLoss: a gradient is not finite; the parameters are unchanged.
        """
        norm = self.check_gradient(clip_gradients(self.parameters, self.clip_norm))
        lr = set_learning_rate(self.optimizer, self.lr_scheduler(self.step, self.total_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"lr": lr, "grad_norm": norm}
