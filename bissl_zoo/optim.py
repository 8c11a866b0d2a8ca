"""Learning-rate schedules as factors on the base rate, and gradient clipping."""

import math
from collections.abc import Iterable

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from bissl_zoo.errors import ConfigError


class LRMultiplier:
    """Factor on the base learning rate as a pure function of the step, without state to save.

    The factor rises linearly from `1 / warmup_steps` at step 0 to 1 at the last warm-up step. After that `scheduler`,
    an fvcore function of progress in [0, 1], covers the remaining steps; its end value is kept beyond them.

    Args:
        scheduler: such as `CosineParamScheduler(start_value=1.0, end_value=0.001)`.
        warmup_steps: number of optimizer steps of linear warm-up.
    """

    def __init__(self, scheduler: ParamScheduler, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ConfigError(f"lr_multiplier: warmup_steps is {warmup_steps}; set it to 0 or more optimizer steps.")
        self.scheduler = scheduler
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the factor at `step` (from 0) of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(total_steps - self.warmup_steps, 1)
        # fvcore's constant schedule raises an error for a progress of 1
        return self.scheduler(min((step - self.warmup_steps) / remaining, math.nextafter(1.0, 0.0)))

    def total(self, total_steps: int) -> float:
        """Return the sum of the factors over a run: its length in steps at the base rate."""
        return sum(self(step, total_steps) for step in range(total_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set the rate of each group to `factor` times its initial rate; return that of the first group."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def effective_learning_rate(optimizer: torch.optim.Optimizer, scheduled: bool = False) -> float:
    """Return `lr / (1 - momentum)` of the first group, the rate of momentum SGD along a constant gradient.

    Args:
        scheduled: use the rate of the current step; otherwise the base rate.
    """
    group = optimizer.param_groups[0]
    rate = group["lr"] if scheduled else group.get("initial_lr", group["lr"])
    return rate / (1.0 - group.get("momentum", 0.0))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Limit the global gradient norm to `max_norm` (None: no limit); return the norm before clipping, a scalar."""
    limit = float("inf") if max_norm is None else max_norm
    return nn.utils.clip_grad_norm_(list(parameters), limit)
