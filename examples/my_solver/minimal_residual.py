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
    """Step along the residual, with the step length that minimises the next residual."""

    iterations: int = 8
    tolerance: float = 0.05
    damping: Damping = "auto"

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve `A x = v` approximately for a flat `(P,)` vector; the residual never grows, also for indefinite `A`."""
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        x, residual, products = torch.zeros_like(v), v.clone(), 0
        while products < self.iterations and residual.norm() > self.tolerance * v.norm():
            product = operator(residual)
            products += 1
            if not torch.isfinite(product).all() or not product.any():
                break
            step = residual.dot(product) / product.dot(product)
            x, residual = x + step * residual, residual - step * product
        error = relative_residual(operator, x, v)
        status = "converged" if error <= self.tolerance else "max_iterations"
        return Solution(x, error, products + 1, status)
