"""Dense curvature and a direct solve, for small problems and tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, Solution, relative_residual


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
        """Solve directly; a singular or non-finite `A` returns `v`, a non-finite `v` zero.

        Raises:
            ValueError: more than `max_size` parameters.
        """
        size = v.numel()
        if size > self.max_size:
            raise ValueError(
                f"solver 'exact' would build a {size} x {size} matrix; its limit is max_size={self.max_size}."
            )
        dense = torch.stack([operator(column) for column in torch.eye(size, dtype=v.dtype, device=v.device)], dim=1)
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), size, "non_finite")
        if not torch.isfinite(dense).all():
            return Solution(v, float("inf"), size, "non_finite")
        x, info = torch.linalg.solve_ex(dense, v)
        # elimination takes a matrix that is singular up to rounding for a regular one; the residual tells
        solved = not info and bool(torch.isfinite(x).all())
        if not solved or not (residual := relative_residual(operator, x, v)) <= torch.finfo(v.dtype).eps ** 0.5:
            return Solution(v, relative_residual(operator, v, v), size + 1 + solved, "singular")
        return Solution(x, residual, size + 1, "converged")
