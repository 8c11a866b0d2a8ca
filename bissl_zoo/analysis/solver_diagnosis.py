"""Compare curvatures and solvers on one bilevel problem, and recommend one of them."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bissl_zoo.bilevel.summary import AMPLIFIED, JOINT
from bissl_zoo.hypergradient.damping import choose_shift, lanczos, smallest_shift
from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two, relative_residual

logger = logging.getLogger(__name__)

#: relative residual of a solved system, for solvers without a tolerance
TOLERANCE = 0.05

Solver = Callable[[LinearOperator, Tensor], Solution]


@dataclass(frozen=True)
class Row:
    """The solves of one alternation with one curvature and one solver.

    Attributes:
        damping: delta of the last solve.
        products: number of products of all right-hand sides.
        residual: largest relative residual, with the solver's own matrix.
        cos_xv: median cosine between the solution `x` and `v`.
        norm_ratio: largest `||x|| / ||v||`.
        status: most frequent status.
        seconds: time of the solves.
        time: time of an alternation relative to one without products.
    """

    curvature: str
    solver: str
    damping: float
    products: int
    residual: float
    cos_xv: float
    norm_ratio: float
    status: str
    seconds: float
    time: float

    def solved(self, tolerance: float) -> bool:
        """Return True if the solves reach the tolerance and do not amplify negative curvature."""
        return self.residual <= tolerance and self.norm_ratio <= AMPLIFIED


def symmetry_error(operator: LinearOperator, u: Tensor, w: Tensor) -> float:
    """Return `|u'Hw - w'Hu| / (||u|| ||Hw||)`; about `1 / sqrt(P)` for random vectors (P,) and an asymmetric matrix."""
    hu, hw = (operator.hessian_product(vector).double() for vector in (u, w))
    u, w = u.double(), w.double()
    size = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(hw)
    return float((u @ hw - w @ hu).abs() / size) if size > 0 else 0.0


def spectrum(operator: LinearOperator, v: Tensor, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of `H` after `steps` Lanczos steps from `v` (P,) and as many from a random vector.

    A Krylov solver sees the spectrum from `v`; the random vector finds extreme eigenvalues that `v` is orthogonal to.

    Returns:
        Ritz values, ascending (k,) float64, and upper bounds of the distance of each to the nearest eigenvalue.
    Raises:
        ValueError: `v` is zero, or products are not finite.
    """
    if not v.any():
        raise ValueError("The right-hand side is zero, so there is no system to solve.")
    space = operator.subspace
    space.clear()
    start = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype).to(v.device)
    for vector in (v / power_of_two(v), start):
        # zero coordinates: start from the new direction alone, without the residual of the previous steps
        lanczos(operator, torch.zeros_like(space.coordinates(vector)), steps)
    if not space.explored:
        raise ValueError("Products with H are not finite.")
    result = space.ritz_values()
    space.clear()
    return result


def sufficient_shift(operator: LinearOperator, v: Tensor, products: int, tolerance: float, at_least: float) -> float:
    """Return the smallest shift with which the residual after `products` Krylov steps is within the tolerance."""
    space = operator.subspace
    space.clear()
    right = space.coordinates(v / power_of_two(v))
    lanczos(operator, right, products)
    size = tolerance * right.norm()
    shift = smallest_shift(lambda s: bool(space.minimal_residual(right, s, True)[1].norm() <= size), at_least)
    space.clear()
    return shift


def solve_all(
    operator: LinearOperator,
    shift: float | None,
    solver: Solver,
    right_hand_sides: Sequence[Tensor],
    lam: float,
    at_least: float,
) -> dict[str, Any]:
    """Solve for the right-hand sides of an alternation, from an empty subspace; return the fields of a :class:`Row`.

    Args:
        shift: lambda + damping; None to choose it from the spectrum, as the BiSSL stage does, with this minimum.
    """
    operator.subspace.clear()
    operator.shift, operator.automatic = shift, shift is None
    spent, seconds, residuals, cosines, ratios, statuses = 0, 0.0, [], [], [], []
    for v in right_hand_sides:
        start = time.perf_counter()
        if operator.shift is None:
            steps, tolerance = getattr(solver, "iterations", 0), getattr(solver, "tolerance", 0) or TOLERANCE
            operator.shift, products = choose_shift(operator, v, steps or 5, tolerance, at_least)
            if steps:
                spent += products
            else:  # the solver has no products; the shift is for the residual
                start = time.perf_counter()
        solution = solver(operator, v)
        seconds += time.perf_counter() - start
        spent += solution.products
        x, residual = solution.x, solution.residual
        residuals.append(relative_residual(operator, x, v) if residual is None else residual)
        cosines.append(float(torch.nn.functional.cosine_similarity(x.double(), v.double(), dim=0)))
        ratios.append(float(x.double().norm() / v.double().norm()))
        statuses.append(solution.status)
    operator.subspace.clear()
    return {
        **{"damping": operator.shift - lam, "products": spent, "residual": max(residuals), "seconds": seconds},
        **{"cos_xv": statistics.median(cosines), "norm_ratio": max(ratios), "status": statistics.mode(statuses)},
    }


def recommend(rows: Iterable[Row], tolerance: float) -> tuple[Row | None, str]:
    """Return the row to use and the reason; None if no solver reaches the tolerance.

    A solver must reach the tolerance and must not amplify negative curvature. Of those that turn the gradient the
    fastest is best; if none does, curvature has no effect, and `identity` does the same for less.
    """
    rows = list(rows)
    solved = [row for row in rows if row.solver != "identity" and row.solved(tolerance)]
    turning = [row for row in solved if row.cos_xv <= JOINT]
    if turning:
        best = min(turning, key=lambda row: row.time)
        degrees = math.degrees(math.acos(max(-1.0, best.cos_xv)))
        return best, (
            f"Use {best.solver} with the {_NAMES[best.curvature]}: it solves the system (residual {best.residual:.2g}, "
            f"{best.products} products per alternation) and turns the gradient by {degrees:.0f} degrees at "
            f"{best.time:.2f} times the time of identity, the least of the solvers that do."
        )
    identity = next((row for row in rows if row.solver == "identity"), None)
    if solved and identity:
        cosine = min(row.cos_xv for row in solved)
        return identity, (
            f"Use identity, or less damping: at damping {solved[0].damping:.4g} curvature changes the gradient little "
            f"(cos(x, v) at least {cosine:.3f}), so joint training does the same in less time."
        )
    iterative = [row for row in rows if row.solver != "identity"]
    best = min(iterative, key=lambda row: row.residual, default=None)
    closest = f"; the smallest residual is {best.residual:.2g} of {best.solver}" if best else ""
    return None, f"No solver reaches the tolerance {tolerance:g}{closest}."


_NAMES = {"gauss_newton": "Gauss-Newton matrix", "hessian": "Hessian"}
