"""The slowly moving copy of the student that gives targets or keys."""

import copy

import torch
from torch import Tensor, nn


class Teacher(nn.ModuleDict):
    """Copy of `backbone`, `tail` and `projector` that no gradient reaches: momentum encoder (arXiv 1911.05722).

    It is part of the method's state. Its batch-norm statistics are its own.
    """

    def __init__(self, **student: nn.Module) -> None:
        super().__init__(copy.deepcopy(student))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, S, S)` -> projections `(B, D)`, constants."""
        features = self["backbone"](images)[self["backbone"].out_features[-1]]
        return self["projector"](self["tail"](features))

    @torch.no_grad()
    def follow(self, decay: float, **student: nn.Module) -> None:
        """Move the parameters to `decay * own + (1 - decay) * student`."""
        for name, module in student.items():
            for slow, fast in zip(self[name].parameters(), module.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)
