"""Dense curvature and a direct solve, for small problems and tests."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two, relative_residual


@dataclass(frozen=True)
class Exact:
    """Build `A` column by column and solve by LU.

    Args:
        damping: delta, added to lambda.
        max_size: largest number of parameters, since memory grows with its square and time with its cube.
    """

    damping: float = 0.0
    max_size: int = 5000

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve directly; an `A` that is singular or not finite returns `v`, a `v` that is not finite zero.

        Raises:
            ValueError: more than `max_size` parameters.
        """
        size = v.numel()
        if size > self.max_size:
            raise ValueError(
                f"solver 'exact' would build a {size} x {size} matrix; its limit is max_size={self.max_size}."
            )
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), math.inf, 0, "non_finite")
        if not v.any():
            return Solution(v, 0.0, 0, "converged")
        dense = torch.stack([operator(column) for column in torch.eye(size, dtype=v.dtype, device=v.device)], dim=1)
        if not torch.isfinite(dense).all():
            return Solution(v, math.inf, size, "non_finite")
        scale = power_of_two(v)
        right = v / scale
        x, info = torch.linalg.solve_ex(dense, right)
        solved = not info and bool(torch.isfinite(x * scale).all())
        residual = relative_residual(operator, x, right) if solved else math.inf
        # elimination takes a matrix that is singular up to rounding for a regular one; the residual tells
        if residual <= torch.finfo(v.dtype).eps ** 0.5:
            return Solution(x * scale, residual, size + 1, "converged")
        residual, products = relative_residual(operator, right, right), size + 1 + solved
        if not math.isfinite(residual):
            return Solution(v, math.inf, products, "non_finite")
        return Solution(v, residual, products, "singular")
