"""Nystrom approximation of the curvature, inverted in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two, relative_residual


@dataclass(frozen=True)
class Nystrom:
    """Solve `A x = v` with the Nystrom approximation of `H` (Hataya and Yamada, arXiv 2302.09726).

    `H ~= K M^+ K^T` with `K = H R` for orthonormal directions `R (P, rank)` and `M = R^T K`. `A` with this `H` is
    inverted by the Woodbury identity: it differs from the identity only in the span of the directions and their
    products. The directions are Gaussian, as in arXiv 2110.02820, while the paper takes columns of `H`; products that
    the subspace already holds are used first. The subspace keeps up to `2 * rank` vectors of length P until the matrix
    changes, so later solves need no products. The approximation of an indefinite `H` can be poor; use `check`.

    Args:
        rank: maximum number of directions.
        tolerance: relative residual up to which the status is `converged`; there is no iteration.
        damping: delta in `A = I + H / (lambda + delta)`; "auto" chooses it in each alternation.
        seed: seed of the directions, which must be equal on all ranks.
        check: compute the residual of each solution with one more product.
    """

    rank: int = 10
    tolerance: float = 0.05
    damping: Damping = "auto"
    seed: int = 0
    check: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"solver 'nystrom': rank={self.rank} must be at least 1.")

    @property
    def iterations(self) -> int:
        """Maximum number of products, as in the iterative solvers; automatic damping reads it."""
        return self.rank

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve `A x = v` for `v (P,)`.

        The status `negative_curvature` means that the approximation of `A` is not positive definite, `diverged` that
        the residual exceeds 1. In both cases one more product measures the residual of `v`, and `v` is returned if its
        residual is smaller. Without `check` the residual is None, the status `not_solved`, and the solution `v` if
        there is negative curvature. The solution is `v` after a non-finite product, and zero for a non-finite `v`.
        """
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        if not v.any():
            return Solution(v, 0.0, 0, "converged")
        products, finite = self._sketch(operator, v)
        if not finite:
            return Solution(v, float("inf"), products, "non_finite")
        scale = power_of_two(v)
        right = v / scale
        x, definite = _solve(operator, right)
        if self.check:
            x, residual, spent, status = self._checked(operator, right, x, definite)
            products += spent
        else:
            residual, status = None, "not_solved" if definite else "negative_curvature"
            x = x if definite else right
        x = x * scale
        if status == "non_finite" or not torch.isfinite(x).all():
            return Solution(v, float("inf"), products, "non_finite")
        return Solution(x, residual, products, status)

    def _sketch(self, operator: LinearOperator, v: Tensor) -> tuple[int, bool]:
        space = operator.subspace
        generator = torch.Generator(v.device).manual_seed(self.seed)
        missing = max(0, self.rank - space.explored)
        for products in range(missing):
            drawn = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
            direction = space.unexplored(space.coordinates(drawn))
            if direction is None:
                return products, True
            if not space.explore(operator.hessian_product, direction):
                return products + 1, False
        return missing, True

    def _checked(
        self, operator: LinearOperator, v: Tensor, x: Tensor, definite: bool
    ) -> tuple[Tensor, float, int, str]:
        residual = relative_residual(operator, x, v)
        if not math.isfinite(residual):
            return v, residual, 1, "non_finite"
        if residual <= self.tolerance:
            return x, residual, 1, "converged"
        if definite and residual <= 1.0:
            return x, residual, 1, "max_iterations"
        status = "diverged" if definite else "negative_curvature"
        residual_of_v = relative_residual(operator, v, v)
        return (v, residual_of_v, 2, status) if residual_of_v < residual else (x, residual, 2, status)


def _solve(operator: LinearOperator, v: Tensor) -> tuple[Tensor, bool]:
    """Solve with the approximation of `A` and return whether it is positive definite; the subspace is unchanged."""
    space = operator.subspace
    size, negligible = len(space.basis), 100 * torch.finfo(v.dtype).eps
    right = space.coordinates(v)
    images = space.absolute_images() if operator.automatic else space.images
    curvature = images @ _pseudo_solve(space.directions.T @ images, images.T, negligible)[0]
    system = torch.eye(len(right), dtype=torch.float64) + curvature / operator.shift
    x, eigenvalues = _pseudo_solve(system, right, negligible)
    solution = v + space.combine(x - right)
    space.truncate(size)
    return solution, bool(eigenvalues[0] > negligible * eigenvalues[-1])


def _pseudo_solve(matrix: Tensor, right: Tensor, negligible: float) -> tuple[Tensor, Tensor]:
    """Return `matrix^+ right` and the eigenvalues, ascending; `matrix` must be symmetric up to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    used = values.abs() > negligible * values.abs().max()
    return (vectors[:, used] / values[used]) @ (vectors[:, used].T @ right), values
