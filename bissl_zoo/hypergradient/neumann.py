"""Truncated Neumann series."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import lanczos
from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two

#: Lanczos steps that estimate the norm of `A`
STEPS = 5


@dataclass(frozen=True)
class Neumann:
    """`x_k = x_{k-1} + eta (v - A x_{k-1})` from `x_0 = 0`, the series `eta sum_k (I - eta A)^k v` (arXiv 1911.02590).

    It converges for positive definite `A` and `eta < 2 / ||A||`; the series with `eta = 1` diverges as soon as `H`
    is larger than twice lambda + damping. Here `eta = 1 / ||A||` as the Ritz values of `H` and their error bounds
    estimate it: from the products that the subspace has, or from a few Lanczos steps, once per matrix.

    Args:
        iterations: terms of the series, each with a product, which measures its residual.
        tolerance: relative residual at which to stop.
        damping: delta, added to lambda in `A = I + H / (lambda + delta)`; "auto" chooses it each alternation.
    """

    iterations: int = 10
    tolerance: float = 0.05
    damping: Damping = "auto"

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"solver 'neumann': iterations={self.iterations} must be at least 1.")

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve; see :class:`Solution` for what comes back: of `v` and all iterates the one with the least residual.

        `negative_curvature` says that a Ritz value of `A` is not positive, so that the series has no limit, `diverged`
        that the residual grew all the same. A product that is not finite ends the solve with the best so far, or `v`;
        a `v` that is not finite is answered by zero.
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
        best, least, previous = v, math.inf, 1.0
        x = eta * v
        for products in range(1, self.iterations + 1):
            rest = v - operator(x)
            residual = float(torch.linalg.vector_norm(rest) / size)
            if not math.isfinite(residual):
                return best, least, products, "non_finite"
            if products == 1:  # A v is known, and with it the residual of v
                least = float(torch.linalg.vector_norm(v - (v - rest) / eta) / size)
            if residual < least:
                best, least = x, residual
            if least <= self.tolerance:
                return best, least, products, "converged"
            # its square is a sum of c q^2k with c, q^2 >= 0, convex in k: once it rises, it rises for ever
            if residual > previous + rounding:
                return best, least, products, "diverged"
            x, previous = x + eta * rest, residual
        return best, least, self.iterations, "max_iterations"


def _step_length(operator: LinearOperator, dtype: torch.dtype) -> tuple[float, bool]:
    """`1 / ||A||` as far as the subspace knows, and whether it knows of no eigenvalue of `A` that is not positive."""
    values, bounds = operator.subspace.ritz_values()
    values, bounds = 1.0 + values / operator.shift, bounds / operator.shift
    # a smaller norm than this is rounding
    norm = max(float((values.abs() + bounds).max()), torch.finfo(dtype).eps ** 0.5)
    return 1.0 / norm, bool(values[0] > 0)
