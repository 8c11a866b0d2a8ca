"""What a system tells of itself before a run: its symmetry, its spectrum, and how each solver converges on it."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import MARGIN, choose_shift, lanczos
from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two

#: relative residual that counts as solved where a solver has no tolerance of its own
TOLERANCE = 0.05

Solver = Callable[[LinearOperator, Tensor], Solution]


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of `H`, ascending `(k,)` float64, and the distance within which each has an eigenvalue."""

    values: Tensor
    bounds: Tensor

    def least(self, shift: float) -> float:
        """The least Ritz value of `A`; its least eigenvalue is no larger."""
        return 1.0 + float(self.values[0]) / shift

    def definiteness(self, shift: float) -> Literal["definite", "indefinite", "undecided"]:
        """Of `A`: indefinite is certain; definite as far as these Ritz values and their bounds tell."""
        if self.least(shift) <= 0:
            return "indefinite"
        return "definite" if 1.0 + float((self.values - self.bounds).min()) / shift > 0 else "undecided"

    def definite_shift(self) -> float:
        """The smallest shift with which `A` keeps :data:`MARGIN` of the identity; 0 where any does."""
        return max(0.0, -float((self.values - self.bounds).min()) / (1.0 - MARGIN))


@dataclass(frozen=True)
class Point:
    """What a solver came to with a budget of products, None where it takes none.

    Attributes:
        products: how many it spent, by its own account.
        residual: `||v - A x|| / ||v||` of what it returned, by a fresh product.
        status: its own.
    """

    budget: int | None
    products: int
    residual: float
    status: str


class Remembering(LinearOperator):
    """The same matrix at a shift of its own; the product with a vector seen before is not computed again.

    Solvers that differ in their budget or damping alone ask for many products twice.

    Args:
        seen: products by the digest of their vector, to be shared between shifts.
    """

    def __init__(self, operator: LinearOperator, shift: float, seen: dict[bytes, Tensor] | None = None) -> None:
        super().__init__(operator.block_sizes, shift)
        self.operator = operator
        self.seen = {} if seen is None else seen

    def hessian_product(self, u: Tensor) -> Tensor:
        """`H @ u` for a flat `(P,)` vector."""
        key = hashlib.blake2b(u.detach().cpu().numpy().tobytes()).digest()
        if key not in self.seen:
            self.seen[key] = self.operator.hessian_product(u)
        return self.seen[key].clone()  # who asked may work on it in place


def symmetry_error(operator: LinearOperator, u: Tensor, w: Tensor) -> float:
    """`|u'Hw - w'Hu| / (||u|| ||Hw||)`; for random `u` and `w (P,)` and any matrix about `1 / sqrt(P)` at most."""
    hu, hw = (operator.hessian_product(vector).double() for vector in (u, w))
    u, w = u.double(), w.double()
    size = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(hw)
    return float((u @ hw - w @ hu).abs() / size) if size > 0 else 0.0


def spectrum(operator: LinearOperator, v: Tensor, steps: int, seed: int = 0) -> Spectrum:
    """Ritz values after `steps` Lanczos steps from `v (P,)` and as many from a random vector.

    From `v`, because these are what a Krylov solver meets; from a random vector, because `v` may lack the ends.

    Raises:
        ValueError: `v` is zero, or no product is finite.
    """
    if not v.any():
        raise ValueError("The right-hand side is zero: there is nothing to solve.")
    space = operator.subspace
    space.clear()
    drawn = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype).to(v.device)
    for start in (v / power_of_two(v), drawn):
        # only what is new of the start: mixed with what the steps before left over, half of the plane would be lost
        lanczos(operator, torch.zeros_like(space.coordinates(start)), steps)
    if not space.explored:
        raise ValueError("Products with H are not finite.")
    found = Spectrum(*space.ritz_values())
    space.clear()
    return found


def automatic_shift(operator: LinearOperator, v: Tensor, solver: Solver, lam: float) -> float:
    """`lambda + delta` as "auto" chooses it in the first alternation for this solver's limit and tolerance."""
    operator.subspace.clear()
    limit, tolerance = getattr(solver, "iterations", 0), getattr(solver, "tolerance", 0)
    shift, _ = choose_shift(operator, v, limit or 5, tolerance if tolerance > 0 else TOLERANCE, lam)
    operator.subspace.clear()
    return shift


def budgets_up_to(limit: int) -> list[int]:
    """1, 2, 3, 5, 8 and so on as Fibonacci has it, and the limit."""
    found = [1, 2]
    while found[-1] < limit:
        found.append(found[-1] + found[-2])
    return [*(n for n in found if n < limit), limit]


def budget_key(solver: Solver) -> str | None:
    """The argument of the solver that limits its products; None where there is none."""
    names = [field.name for field in dataclasses.fields(solver)] if dataclasses.is_dataclass(solver) else []
    return next((key for key in ("iterations", "rank") if key in names), None)


def refuses(solver: Solver, size: int) -> bool:
    """Whether the solver takes no system of this many unknowns."""
    return size > getattr(solver, "max_size", size)


def solve_cold(operator: Remembering, v: Tensor, solver: Solver, budget: int | None) -> tuple[Point, Tensor]:
    """Solve from nothing, and measure the residual by a product that is not remembered."""
    operator.subspace.clear()
    solution = solver(operator, v)
    operator.subspace.clear()
    product = solution.x + operator.operator.hessian_product(solution.x) / operator.shift
    rest, size = (torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in (v - product, v))
    return Point(budget, solution.products, float(rest / size), solution.status), solution.x


def convergence(operator: Remembering, v: Tensor, solver: Solver, budgets: list[int]) -> tuple[list[Point], Tensor]:
    """The solver with each budget, its tolerance out of reach, and the solution of the last."""
    key = budget_key(solver)
    if key is None:
        point, x = solve_cold(operator, v, solver, None)
        return [point], x
    points = []
    for budget in budgets:
        patient = dataclasses.replace(solver, **{key: budget, "tolerance": 1e-12})
        point, x = solve_cold(operator, v, patient, budget)
        points.append(point)
    return points, x
