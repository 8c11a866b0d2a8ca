"""One level of the bilevel problem, or the only level of a stage that has one: what is trained, and how."""

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

ADVICE = "Lower the learning rate, lengthen the warm-up, or look at the inputs of this step."


@dataclass
class Level:
    """A backbone, a head on it, and how they are trained.

    Attributes:
        name: `lower` or `upper` (or the stage's name where there is one level only), for messages and metrics.
        data_iterator: endless iterator of batches as `head.losses` takes them; a generator if a trainer closes it.
        lr_scheduler: factor on the learning rate; total_steps: the length of its schedule in optimizer steps.
        clip_norm: limit of the global gradient norm; None for none.
        amp_dtype: of autocast in losses that are differentiated once; None for full precision.
        batch_size: images in a batch over all ranks, for the figures of speed; 0 where nobody asks.
        guard: takes each step and returns what it did, or nothing if it undid the step; None for no guard.
        step: optimizer steps taken or undone.
        images: images taken from `data_iterator` since this process started, over all ranks.
        data_time: seconds spent waiting for them.
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
        """The next batch; the time that it takes to come is the time that training waits for data."""
        start = time.perf_counter()
        batch = next(self.data_iterator)
        self.data_time += time.perf_counter() - start
        self.images += self.batch_size
        return batch

    @property
    def backbone_parameters(self) -> list[Tensor]:
        """What the levels share, in the order of a flat vector."""
        return list(self.backbone.parameters())

    @property
    def head_parameters(self) -> list[Tensor]:
        """The head's parameters that are trained."""
        return [p for p in self.head.parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[Tensor]:
        """All that this level's optimizer trains."""
        return [p for p in self.backbone.parameters() if p.requires_grad] + self.head_parameters

    def attempt(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The metrics of `step`, which is one of this level, by way of the guard where there is one."""
        return self.guard(step) if self.guard else step()

    def loss(
        self, backbone: nn.Module, batch: Any, amp: bool = True, check: bool = True
    ) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of this level's head on `backbone`, with its graph, and the terms by name as numbers.

        Args:
            amp: whether to compute in `amp_dtype`; a loss that is differentiated twice is not.
            check: whether to refuse numbers that are not finite.
        Raises:
            NonFiniteLoss: on any rank, with the level, the step and the losses by name.
        """
        device = next(self.head.parameters()).device.type
        with torch.autocast(device, self.amp_dtype, enabled=amp and self.amp_dtype is not None):
            losses = self.head.losses(backbone, batch)
        total = torch.stack(list(losses.values())).sum()
        values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist(), strict=True))
        bad = not all(math.isfinite(value) for value in values.values())
        if check and any_rank(bad, total.device):
            terms = ", ".join(f"{name}={value:g}" for name, value in values.items()) if bad else None
            rank, terms = next((r, found) for r, found in enumerate(all_gather_objects(terms)) if found)
            raise NonFiniteLoss(
                f"{self.name} level, step {self.step}, rank {rank}: the loss is not finite ({terms}). {ADVICE}", rank
            )
        return total, values

    def check_gradient(self, norm: float) -> float:
        """`norm`, of a gradient of this level's loss.

        Raises:
            NonFiniteLoss: it is not finite.
        """
        if not math.isfinite(norm):
            where = f"{self.name} level, step {self.step}"
            raise NonFiniteLoss(f"{where}: the loss is finite but the norm of its gradient is {norm}. {ADVICE}")
        return norm

    def optimize(self) -> dict[str, float]:
        """Clip the gradients that are there, set this step's learning rate, and take the step.

        Raises:
            NonFiniteLoss: a gradient is not finite; the parameters are still those of before the step.
        """
        norm = self.check_gradient(clip_gradients(self.parameters, self.clip_norm))
        lr = set_learning_rate(self.optimizer, self.lr_scheduler(self.step, self.total_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"lr": lr, "grad_norm": norm}
