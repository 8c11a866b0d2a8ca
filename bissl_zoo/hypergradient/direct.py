"""Solvers without iterations: a dense direct solve for small problems, and the identity as the cheap baseline."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two, relative_residual


@dataclass(frozen=True)
class Exact:
    """Build `A` column by column and solve by LU factorization, for small problems and tests.

    Args:
        damping: delta in `A = I + H / (lambda + delta)`.
        max_size: maximum number of parameters; memory grows with its square and time with its cube.
    """

    damping: float = 0.0
    max_size: int = 5000

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve `A x = v` for `v (P,)`; return `v` if `A` is singular or not finite, and zero if `v` is not finite.

        Raises:
            ValueError: P exceeds `max_size`.
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
        # elimination does not detect a matrix that is singular up to rounding; the residual does
        if residual <= torch.finfo(v.dtype).eps ** 0.5:
            return Solution(x * scale, residual, size + 1, "converged")
        residual, products = relative_residual(operator, right, right), size + 1 + solved
        if not math.isfinite(residual):
            return Solution(v, math.inf, products, "non_finite")
        return Solution(v, residual, products, "singular")


@dataclass(frozen=True)
class Identity:
    """Return `x = v`: treat the lower backbone as equal to `theta_D`, which is joint training of both objectives."""

    damping: float = 0.0

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Return `v (P,)` without a product, or zero if `v` is not finite."""
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), residual=None, products=0, status="non_finite")
        return Solution(v, residual=None, products=0, status="not_solved")
