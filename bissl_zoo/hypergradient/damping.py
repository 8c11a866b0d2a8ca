"""The smallest damping for which the system is definite and can be solved."""

from collections.abc import Callable

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, power_of_two
from bissl_zoo.hypergradient.subspace import Subspace

#: smallest eigenvalue of `A` that counts as safely positive
MARGIN = 0.1

#: shift beyond which the curvature is below any rounding
LARGEST = 1e30


def choose_shift(
    operator: LinearOperator, v: Tensor, iterations: int, tolerance: float, at_least: float
) -> tuple[float, int]:
    """`lambda + delta` for this matrix: a trust region in the sense of Levenberg (1944) and Marquardt (1963).

    Lanczos steps from `v` give the ends of the spectrum of `H` and, as the Krylov space does not depend on the damping,
    the residual of a solve of that many steps for every damping at once. Chosen is the smallest shift for which the
    least Ritz value, less its error bound, leaves `A` an eigenvalue of at least :data:`MARGIN`, and for which that
    residual is within the tolerance. The products stay in `operator.subspace`, where a solve of `v` finds them.

    Args:
        v: `(P,)`, the first right-hand side.
        iterations: Lanczos steps, the solver's limit.
        tolerance: relative residual that the solver is to reach.
        at_least: the shift without damping, lambda.
    Returns:
        The shift and the number of products spent; `at_least` where `v` is zero or nothing is finite.
    Raises:
        ValueError: a tolerance of 0, which no damping reaches.
    """
    if not tolerance > 0:
        raise ValueError(f'damping "auto" makes the tolerance reachable, so it must be positive, not {tolerance}.')
    space = operator.subspace
    if not torch.isfinite(v).all() or not v.any():
        return at_least, 0
    right = space.coordinates(v / power_of_two(v))
    spent = lanczos(operator, right, iterations)
    if not space.explored:
        return at_least, spent
    low = max(at_least, definite_shift(space))
    return smallest_shift(lambda shift: _residual(space, right, shift) <= tolerance, low), spent


def definite_shift(space: Subspace, bounded: bool = True) -> float:
    """The smallest shift for which `A` is safely positive definite as far as `space` knows; 0 if any is.

    Args:
        bounded: go by the Ritz values less their error bounds, not by the Ritz values alone.
    """
    values, bounds = space.ritz_values()
    least = (values - bounds if bounded else values).min()
    return max(0.0, -float(least) / (1.0 - MARGIN))


def lanczos(operator: LinearOperator, start: Tensor, steps: int) -> int:
    """Explore the Krylov space of the vector with coordinates `start`; returns the number of products spent."""
    space = operator.subspace
    direction = space.unexplored(start)
    for step in range(steps):
        if direction is None:
            return step
        if not space.explore(operator.hessian_product, direction):
            return step + 1
        direction = space.unexplored()
    return steps


def _residual(space: Subspace, right: Tensor, shift: float) -> float:
    """Relative residual of the Galerkin solution, that of conjugate gradient; the minimal one is below it."""
    right = torch.nn.functional.pad(right, (0, len(space.basis) - len(right)))
    applied = space.directions + space.images / shift
    y, info = torch.linalg.solve_ex(space.directions.T @ applied, space.directions.T @ right)
    return float((right - applied @ y).norm() / right.norm()) if not info else float("inf")


def smallest_shift(accepts: Callable[[float], bool], low: float, precision: float = 1.01) -> float:
    """Smallest accepted shift from `low` up to `precision`; `accepts` holds for all large ones.

    What no product has reached is never solved: the search ends at :data:`LARGEST`, where `A = I`.
    """
    if accepts(low):
        return low
    high = max(low, 1e-6)
    while high < LARGEST and not accepts(high):
        low, high = high, 2.0 * high
    while high / low > precision:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if accepts(middle) else (middle, high)
    return high
