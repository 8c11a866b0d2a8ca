"""The momentum teacher that provides targets or keys."""

import copy

import torch
from torch import Tensor, nn

from bissl_zoo.backbones import tail_input


class Teacher(nn.ModuleDict):
    """Momentum encoder: a copy of `backbone`, `tail` and `projector` without gradients (arXiv 1911.05722, section 3.2).

    It is part of the method's state dict. Its batch-norm statistics come from its own forward passes.
    """

    def __init__(self, **student: nn.Module) -> None:
        super().__init__(copy.deepcopy(student))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, 3, S, S)` to projections `(B, D)` without gradients."""
        backbone = self["backbone"]
        features = tail_input(backbone(images), backbone.out_features[-1])
        return self["projector"](self["tail"](features))

    def reset(self, **student: nn.Module) -> None:
        """Set parameters and buffers to those of the student."""
        for name, module in student.items():
            self[name].load_state_dict(module.state_dict())

    @torch.no_grad()
    def follow(self, decay: float, **student: nn.Module) -> None:
        """Set the parameters to `decay * teacher + (1 - decay) * student` (arXiv 1911.05722, equation 2)."""
        for name, module in student.items():
            for slow, fast in zip(self[name].parameters(), module.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)
