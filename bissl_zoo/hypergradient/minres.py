"""Minimum residual with a Krylov space that is recycled between solves with the same matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import smallest_shift
from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two
from bissl_zoo.hypergradient.subspace import Subspace


@dataclass(frozen=True)
class MinRes:
    """Solve `A x = v` for a symmetric, possibly indefinite `A` by minimal residuals over a recycled Krylov space.

    The first solve with a matrix is MINRES (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975) with full
    orthogonalization. Later solves first search the space of the earlier ones, which costs no product, and spend
    products only on the remaining residual (as in Wang, de Sturler and Paulino, IJNME 69, 2007).

    Automatic damping is chosen for the first right-hand side, and negative Ritz values count with their absolute value,
    so that `||x|| <= ||v||`. If `recycled_iterations` products do not solve a later one, the damping rises until the
    explored space is sufficient. The cost of an alternation is bounded, and every solve reaches its tolerance.

    Args:
        iterations: maximum number of products for one right-hand side.
        tolerance: relative residual at which to stop.
        damping: delta in `A = I + H / (lambda + delta)`; "auto" chooses it in each alternation.
        recycle: number of basis vectors of length P kept between the solves of an alternation; 0 disables recycling.
        recycled_iterations: with automatic damping, maximum products for each later right-hand side.
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
        """Solve `A x = v` for `v (P,)`.

        A non-finite product ends the solve with the best iterate so far, or `v` if there is none. The solution for a
        non-finite `v` is zero. The status `singular` means that `A` maps the searched space into itself and the
        residual is still above the tolerance.
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
        """Return the coordinates of the solution `(m,)`, its relative residual, the products spent and the status."""
        size, status = float(right.norm()), "max_iterations"
        limit = self.iterations
        if operator.automatic and space.explored:
            limit = min(self.iterations, self.recycled_iterations)
        for products in range(limit + 1):
            x, residual, rest = _minimize(operator, right, operator.shift)
            if residual <= self.tolerance * size:
                return x, residual / size, products, "converged"
            if products == limit:
                break
            # automatic damping needs A v: with it, a large enough shift always solves the system
            direction = space.unexplored(right, rest) if operator.automatic and not products else space.unexplored(rest)
            if direction is None:
                status = "singular"
                break
            if not space.explore(operator.hessian_product, direction):
                return x, residual / size if x.any() else float("inf"), products + 1, "non_finite"
        if operator.automatic:
            operator.shift = smallest_shift(
                lambda shift: _minimize(operator, right, shift)[1] <= self.tolerance * size, operator.shift
            )
            x, residual, _ = _minimize(operator, right, operator.shift)
            status = "converged" if residual <= self.tolerance * size else status
        return x, residual / size, products, status


def _minimize(operator: LinearOperator, right: Tensor, shift: float) -> tuple[Tensor, float, Tensor]:
    """Return the best `x` in the space, the norm of its residual, and the residual; coordinates `(m,)`."""
    x, rest = operator.subspace.minimal_residual(right, shift, operator.automatic)
    return x, float(rest.norm()), rest
