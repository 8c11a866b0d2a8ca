"""Minimum residual, started from what earlier solves with the same matrix learnt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two
from bissl_zoo.hypergradient.subspace import Subspace


@dataclass(frozen=True)
class MinRes:
    """Minimal residuals over a recycled Krylov space, for `A x = v` with `A` symmetric, definite or not.

    The first solve with a matrix is MINRES (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975) with full
    orthogonalisation. The following ones search the space of the earlier solves as well, which costs no product, and
    spend products only on what these leave of the residual (as in Wang, de Sturler and Paulino, IJNME 69, 2007).

    Args:
        iterations: most products spent on one right-hand side.
        tolerance: relative residual at which to stop.
        damping: delta, added to lambda in `A = I + H / (lambda + delta)`; "auto" chooses it each alternation.
        recycle: basis vectors of length P kept between the solves of an alternation; 0 starts each from nothing.
    """

    iterations: int = 8
    tolerance: float = 0.05
    damping: Damping = "auto"
    recycle: int = 12

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.recycle < 0:
            raise ValueError(
                f"solver 'minres': iterations={self.iterations} must be 1 or more, recycle={self.recycle} 0 or more."
            )

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve; see :class:`Solution` for what comes back.

        A product that is not finite ends the solve with the best iterate so far, or `v` before there is one; a `v` that
        is not finite is answered by zero. `singular` says that `A` maps the space searched into itself and still leaves
        a residual above the tolerance.
        """
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        if not v.any():
            return Solution(v, 0.0, 0, "converged")
        space, scale = operator.subspace, power_of_two(v)
        right = space.coordinates(v / scale)
        x, residual, products, status = self._search(operator, space, right)
        solution = space.combine(x).mul_(scale) if status != "non_finite" or x.any() else v
        space.truncate(self.recycle)
        if not torch.isfinite(solution).all():
            return Solution(v, float("inf"), products, "non_finite")
        return Solution(solution, residual, products, status)

    def _search(self, operator: LinearOperator, space: Subspace, right: Tensor) -> tuple[Tensor, float, int, str]:
        size = float(right.norm())
        for products in range(self.iterations + 1):
            x, rest = space.minimal_residual(right, operator.strength)
            residual = float(rest.norm()) / size
            if residual <= self.tolerance:
                return x, residual, products, "converged"
            if products == self.iterations:
                break
            direction = space.unexplored(rest)
            if direction is None:
                return x, residual, products, "singular"
            if not space.explore(operator.hessian_product, direction):
                return x, residual if x.any() else float("inf"), products + 1, "non_finite"
        return x, residual, self.iterations, "max_iterations"
