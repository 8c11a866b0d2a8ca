"""Truncated Neumann series."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import lanczos
from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two

#: number of Lanczos steps that estimate the norm of `A`
STEPS = 5


@dataclass(frozen=True)
class Neumann:
    """Solve `A x = v` by `x_k = x_{k-1} + eta (v - A x_{k-1})`, `x_0 = 0` (Neumann series, arXiv 1911.02590).

    The series `eta sum_k (I - eta A)^k v` converges for positive definite `A` and `eta < 2 / ||A||`; with `eta = 1` it
    diverges once `||H||` exceeds lambda + damping. Here `eta = 1 / ||A||`, estimated from the Ritz values of `H` and
    their error bounds: from products that the subspace already holds, or from a few Lanczos steps, once per matrix.

    Args:
        iterations: maximum number of terms, each with one product, which also measures the residual.
        tolerance: relative residual at which to stop.
        damping: delta in `A = I + H / (lambda + delta)`; "auto" chooses it in each alternation.
    """

    iterations: int = 10
    tolerance: float = 0.05
    damping: Damping = "auto"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"solver 'neumann': iterations={self.iterations} must be at least 1.")

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve `A x = v` for `v (P,)`; return the one of `v` and all iterates with the smallest residual.

        The status `negative_curvature` means that `A` has a Ritz value that is not positive, so the series has no
        limit; `diverged` means that the residual grew although all Ritz values are positive. A non-finite product ends
        the solve with the best iterate so far, or `v`. The solution for a non-finite `v` is zero.
        """
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        if not v.any():
            return Solution(v, 0.0, 0, "converged")
        scale = power_of_two(v)
        right = v / scale
        spent = self._estimate(operator, right)
        if not operator.subspace.explored:
            return Solution(v, float("inf"), spent, "non_finite")
        eta, definite = _step_length(operator, v.dtype)
        x, residual, products, status = self._series(operator, right, eta)
        if not definite and status in ("max_iterations", "diverged"):
            status = "negative_curvature"
        x = x * scale
        if not torch.isfinite(x).all():
            return Solution(v, float("inf"), spent + products, "non_finite")
        return Solution(x, residual, spent + products, status)

    def _estimate(self, operator: LinearOperator, v: Tensor) -> int:
        space = operator.subspace
        return 0 if space.explored else lanczos(operator, space.coordinates(v), min(STEPS, self.iterations))

    def _series(self, operator: LinearOperator, v: Tensor, eta: float) -> tuple[Tensor, float, int, str]:
        size, rounding = torch.linalg.vector_norm(v), torch.finfo(v.dtype).eps ** 0.5
        best, best_residual, previous = v, math.inf, 1.0
        x = eta * v
        for products in range(1, self.iterations + 1):
            rest = v - operator(x)
            residual = float(torch.linalg.vector_norm(rest) / size)
            if not math.isfinite(residual):
                return best, best_residual, products, "non_finite"
            if products == 1:  # A v is known, which gives the residual of v
                best_residual = float(torch.linalg.vector_norm(v - (v - rest) / eta) / size)
            if residual < best_residual:
                best, best_residual = x, residual
            if best_residual <= self.tolerance:
                return best, best_residual, products, "converged"
            # the squared residual is a sum of c q^2k with c, q^2 >= 0, convex in k: it never falls after a rise
            if residual > previous + rounding:
                return best, best_residual, products, "diverged"
            x, previous = x + eta * rest, residual
        return best, best_residual, self.iterations, "max_iterations"


def _step_length(operator: LinearOperator, dtype: torch.dtype) -> tuple[float, bool]:
    """Return `1 / ||A||` and whether all eigenvalues of `A` are positive, both as estimated from the subspace."""
    values, bounds = operator.subspace.ritz_values()
    values = values.abs().sort().values if operator.automatic else values
    values, bounds = 1.0 + values / operator.shift, bounds / operator.shift
    # a smaller norm is rounding error
    norm = max(float((values.abs() + bounds).max()), torch.finfo(dtype).eps ** 0.5)
    return 1.0 / norm, bool(values[0] > 0)
