"""Minimum residual, started from what earlier solves with the same matrix learnt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import smallest_shift
from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two
from bissl_zoo.hypergradient.subspace import Subspace


@dataclass(frozen=True)
class MinRes:
    """Minimal residuals over a recycled Krylov space, for `A x = v` with `A` symmetric, definite or not.

    The first solve with a matrix is MINRES (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975) with full
    orthogonalisation. The following ones search the space of the earlier solves as well, which costs no product, and
    spend products only on what these leave of the residual (as in Wang, de Sturler and Paulino, IJNME 69, 2007).

    Automatic damping is chosen for the first right-hand side. A later one on which `recycled_iterations` products were
    spent in vain raises it, until what is known of the matrix is enough: so the price of an alternation is bounded, and
    every solve reaches its tolerance.

    Args:
        iterations: most products spent on one right-hand side.
        tolerance: relative residual at which to stop.
        damping: delta, added to lambda in `A = I + H / (lambda + delta)`; "auto" chooses it each alternation.
        recycle: basis vectors of length P kept between the solves of an alternation; 0 starts each from nothing.
        recycled_iterations: with automatic damping, most products spent on a right-hand side after the first.
    """

    iterations: int = 6
    tolerance: float = 0.05
    damping: Damping = "auto"
    recycle: int = 8
    recycled_iterations: int = 2

    def __post_init__(self) -> None:
        if min(self.iterations, self.recycled_iterations) < 1 or self.recycle < 0:
            raise ValueError(
                f"solver 'minres': iterations={self.iterations} and recycled_iterations={self.recycled_iterations} "
                f"must be 1 or more, recycle={self.recycle} 0 or more."
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
        """Coordinates of the solution, its relative residual, the products spent and the status."""
        size, status = float(right.norm()), "max_iterations"
        limit = self.iterations
        if operator.automatic and space.explored:
            limit = min(self.iterations, self.recycled_iterations)
        for products in range(limit + 1):
            x, residual, rest = _least(space, right, operator.shift)
            if residual <= self.tolerance * size:
                return x, residual / size, products, "converged"
            if products == limit:
                break
            # once v itself is explored, enough damping solves
            direction = space.unexplored(right, rest) if operator.automatic and not products else space.unexplored(rest)
            if direction is None:
                status = "singular"
                break
            if not space.explore(operator.hessian_product, direction):
                return x, residual / size if x.any() else float("inf"), products + 1, "non_finite"
        if operator.automatic:
            operator.shift = smallest_shift(
                lambda shift: _least(space, right, shift)[1] <= self.tolerance * size, operator.shift
            )
            x, residual, _ = _least(space, right, operator.shift)
            status = "converged" if residual <= self.tolerance * size else status
        return x, residual / size, products, status


def _least(space: Subspace, right: Tensor, shift: float) -> tuple[Tensor, float, Tensor]:
    """The best `x` in the space, the norm of its residual, and this residual; coordinates `(m,)`."""
    x, rest = space.minimal_residual(right, shift)
    return x, float(rest.norm()), rest
