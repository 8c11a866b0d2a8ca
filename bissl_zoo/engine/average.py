"""An exponential moving average of the weights of a stage."""

import copy

import torch
from torch import nn

from bissl_zoo.bilevel.level import Level


class WeightAverage(nn.Module):
    """Copies of a level's backbone and head whose state follows theirs.

    What the level trains, and the batch-norm statistics that belong to it, move to `decay * own + (1 - decay) * new`;
    the rest, which has an average or a memory of its own (teachers, queues, counters), is copied. At update n the decay
    is at most `(1 + n) / (10 + n)`, so that the random weights of the start are forgotten in a short stage too.

    Args:
        decay: per optimizer step, in [0, 1).
    """

    def __init__(self, level: Level, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.backbone = copy.deepcopy(level.backbone).requires_grad_(False)
        self.head = copy.deepcopy(level.head).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, level: Level) -> None:
        """Follow the level after one of its optimizer steps."""
        self.updates += 1
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for own, new in ((self.backbone, level.backbone), (self.head, level.head)):
            for mine, theirs in zip(own.modules(), new.modules(), strict=True):
                _follow(mine, theirs, decay)


def _follow(own: nn.Module, new: nn.Module, decay: float) -> None:
    """Move what the module itself holds; its children are left out."""
    trained = any(parameter.requires_grad for parameter in new.parameters(recurse=False))
    statistics = trained and isinstance(new, nn.modules.batchnorm._BatchNorm)
    for mine, theirs in zip(own.parameters(recurse=False), new.parameters(recurse=False), strict=True):
        mine.lerp_(theirs, 1.0 - decay if theirs.requires_grad else 1.0)
    for mine, theirs in zip(own.buffers(recurse=False), new.buffers(recurse=False), strict=True):
        if statistics and theirs.is_floating_point():
            mine.lerp_(theirs, 1.0 - decay)
        else:
            mine.copy_(theirs)
