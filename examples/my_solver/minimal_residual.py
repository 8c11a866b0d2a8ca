"""The minimal residual iteration (Saad, Iterative Methods for Sparse Linear Systems, 2003, section 5.3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient import LinearOperator, Solution
from bissl_zoo.hypergradient.solver import Damping, relative_residual
from bissl_zoo.registry import SOLVERS


@SOLVERS.register("minimal_residual")
@dataclass(frozen=True)
class MinimalResidual:
    """Steps along the residual, each as long as makes the next residual shortest."""

    iterations: int = 8
    tolerance: float = 0.05
    damping: Damping = "auto"

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """An approximate solution of `A x = v`; the residual never grows, whatever `A` is."""
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        x, rest, products = torch.zeros_like(v), v.clone(), 0
        while products < self.iterations and rest.norm() > self.tolerance * v.norm():
            image = operator(rest)
            products += 1
            if not torch.isfinite(image).all() or not image.any():
                break
            step = rest.dot(image) / image.dot(image)
            x, rest = x + step * rest, rest - step * image
        residual = relative_residual(operator, x, v)
        status = "converged" if residual <= self.tolerance else "max_iterations"
        return Solution(x, residual, products + 1, status)
