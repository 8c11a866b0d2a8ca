"""Learning-rate multipliers, gradient clipping and the one optimizer step that all stages share."""

import math
from collections.abc import Iterable

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from bissl_zoo.errors import ConfigError


class LRMultiplier:
    """The factor on the base learning rate, a pure function of the step: nothing to save, nothing to restore.

    Step 0 of `warmup_steps` runs at `1/warmup_steps` of the base, the last one at the base; then `scheduler`, fvcore's
    function of progress in [0, 1], runs over the remaining steps and stays at its end value beyond them.

    Args:
        scheduler: e.g. `CosineParamScheduler(start_value=1.0, end_value=0.001)`.
        warmup_steps: optimizer steps of linear warm-up; 0 for none.
    """

    def __init__(self, scheduler: ParamScheduler, warmup_steps: int = 0) -> None:
        if warmup_steps < 0:
            raise ConfigError(f"lr_multiplier: warmup_steps is {warmup_steps}; it counts optimizer steps, 0 or more.")
        self.scheduler = scheduler
        self.warmup_steps = warmup_steps

    def __call__(self, step: int, total_steps: int) -> float:
        """The factor of 0-based `step` in a run of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(total_steps - self.warmup_steps, 1)
        # fvcore's constant schedule refuses a progress of 1
        return self.scheduler(min((step - self.warmup_steps) / remaining, math.nextafter(1.0, 0.0)))

    def total(self, total_steps: int) -> float:
        """The sum of the factors over a run: its length in steps at the full base rate."""
        return sum(self(step, total_steps) for step in range(total_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to `factor` times the rate it was built with; returns the first group's."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def effective_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """`lr / (1 - momentum)` of the first group, the rate at which momentum SGD moves along a constant gradient."""
    group = optimizer.param_groups[0]
    return group.get("initial_lr", group["lr"]) / (1.0 - group.get("momentum", 0.0))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale the gradients so that their global norm is at most `max_norm` (None: no limit); returns the norm before."""
    limit = float("inf") if max_norm is None else max_norm
    return float(nn.utils.clip_grad_norm_(list(parameters), limit))
