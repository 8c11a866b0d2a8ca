"""Nystrom approximation of the curvature: a closed-form inverse."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two, relative_residual
from bissl_zoo.hypergradient.subspace import Subspace


@dataclass(frozen=True)
class Nystrom:
    """Solve with the Nystrom approximation of `H`, which products spent once determine (arXiv 2302.09726).

    `H ~= K M^+ K^T` with `K = H R` for orthonormal directions `R` and `M = R^T K`. `I` plus this is inverted in the
    space of the directions and their products, and is the identity outside (Woodbury). The directions are Gaussian, as
    in arXiv 2110.02820, where the paper takes columns of `H`; products that are there already are used first. The
    subspace keeps up to 2 `rank` vectors of length P until the matrix changes, and further solves spend no product on
    it. An indefinite `H` may have a poor approximation: `check` tells.

    Args:
        rank: most directions.
        tolerance: relative residual up to which a solution counts as converged; nothing is iterated.
        damping: delta, added to lambda in `A = I + H / (lambda + delta)`; "auto" chooses it each alternation.
        seed: of the directions, the same on every rank.
        check: spend a product on each solution's residual.
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
        """Products that a solve may take, as of an iterative solver."""
        return self.rank

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve; see :class:`Solution` for what comes back.

        `negative_curvature` says that the approximation of `A` is not positive definite, `diverged` that the residual
        exceeds 1; both are answered by `v` where its residual is smaller, which one more product tells. Without `check`
        the residual is None, the status `not_solved`, and negative curvature is answered by `v`. A product that is not
        finite is answered by `v`, a `v` that is not finite by zero.
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
        x, definite = _solve(operator.subspace, right, operator.shift)
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


def _solve(space: Subspace, v: Tensor, shift: float) -> tuple[Tensor, bool]:
    """The solution with the approximation of `A`, and whether this is positive definite; `space` is left as it was."""
    size, negligible = len(space.basis), 100 * torch.finfo(v.dtype).eps
    right = space.coordinates(v)
    projected = space.directions.T @ space.images
    curvature = space.images @ _pseudo_solve(projected, space.images.T, negligible)[0]
    x, eigenvalues = _pseudo_solve(torch.eye(len(right), dtype=torch.float64) + curvature / shift, right, negligible)
    solution = v + space.combine(x - right)
    space.truncate(size)
    return solution, bool(eigenvalues[0] > negligible * eigenvalues[-1])


def _pseudo_solve(matrix: Tensor, right: Tensor, negligible: float) -> tuple[Tensor, Tensor]:
    """`M^+ right` for a matrix that is symmetric up to rounding, and its eigenvalues, ascending."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = values.abs() > negligible * values.abs().max()
    return (vectors[:, kept] / values[kept]) @ (vectors[:, kept].T @ right), values
