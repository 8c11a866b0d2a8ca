"""Automatic damping of an indefinite matrix: the smallest one with which the solver reaches its tolerance."""

from collections.abc import Callable

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import LinearOperator, power_of_two
from bissl_zoo.hypergradient.subspace import Subspace

#: shift beyond which the curvature is below any rounding
LARGEST = 1e30


def choose_shift(
    operator: LinearOperator, v: Tensor, iterations: int, tolerance: float, at_least: float
) -> tuple[float, int]:
    """Choose `lambda + delta` for this matrix: the smallest one with a residual within the tolerance.

    Lanczos steps from `v` explore a Krylov space, which does not depend on the damping, so they give the residual after
    that many steps for every damping. Negative Ritz values count with their absolute value. The products are kept in
    `operator.subspace` and reused by the solve of `v`.

    Args:
        operator: its shift may be None.
        v: `(P,)`, the first right-hand side.
        iterations: number of Lanczos steps, the limit of the solver.
        tolerance: relative residual that the solver must reach.
        at_least: smallest shift.
    Returns:
        The shift and the number of products spent; the shift is `at_least` if `v` is zero or the first product or `v`
        is not finite.
    Raises:
        ValueError: the tolerance is 0, which no damping reaches.
    """
    if not tolerance > 0:
        raise ValueError(f'damping="auto" needs a positive tolerance, not {tolerance}; set solver.tolerance.')
    space = operator.subspace
    if not torch.isfinite(v).all() or not v.any():
        return at_least, 0
    right = space.coordinates(v / power_of_two(v))
    spent = lanczos(operator, right, iterations)
    if not space.explored:
        return at_least, spent
    return smallest_shift(lambda shift: _residual(space, right, shift) <= tolerance, at_least), spent


def lanczos(operator: LinearOperator, start: Tensor, steps: int) -> int:
    """Explore the Krylov space of the vector with coordinates `start (m,)`; return the number of products spent."""
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
    """Return the relative residual of the Galerkin (CG) solution, an upper bound of the minimal one."""
    right = torch.nn.functional.pad(right, (0, len(space.basis) - len(right)))
    applied = space.directions + space.absolute_images() / shift
    y, info = torch.linalg.solve_ex(space.directions.T @ applied, space.directions.T @ right)
    return float((right - applied @ y).norm() / right.norm()) if not info else float("inf")


def smallest_shift(accepts: Callable[[float], bool], low: float, precision: float = 1.01) -> float:
    """Return the smallest accepted shift that is at least `low`, within a factor of `precision`.

    `accepts` must hold for all large shifts. The search ends at :data:`LARGEST`, where `A = I`, since no shift removes
    a residual outside the explored space.
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
