"""No curvature at all: the cheap baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, Solution


@dataclass(frozen=True)
class Identity:
    """`x = v`: the upper level sees the lower backbone as if it followed `theta_D` exactly; joint training."""

    damping: float = 0.0

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Return `v` without a product; a non-finite `v` is answered by zero."""
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), residual=None, products=0, status="non_finite")
        return Solution(v, residual=None, products=0, status="not_solved")
