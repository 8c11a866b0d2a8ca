"""Spectrum of a linear system `A x = v`, convergence of every solver on it, and changes that make a solver converge."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bissl_zoo.hypergradient.damping import MARGIN, choose_shift, lanczos
from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two

logger = logging.getLogger(__name__)

#: relative residual of a solved system, for solvers without a tolerance
TOLERANCE = 0.05

Solver = Callable[[LinearOperator, Tensor], Solution]


# ------------------------------------------------------------------------------------------------ the system


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of `H`, ascending (k,) float64, with the distance to the nearest eigenvalue as an upper bound."""

    values: Tensor
    bounds: Tensor

    def smallest(self, shift: float) -> float:
        """Return the smallest Ritz value of `A = I + H / shift`, an upper bound of its smallest eigenvalue."""
        return 1.0 + float(self.values[0]) / shift

    def definiteness(self, shift: float) -> Literal["definite", "indefinite", "undecided"]:
        """Classify `A`: "indefinite" is certain, "definite" as far as the Ritz values and their bounds show."""
        if self.smallest(shift) <= 0:
            return "indefinite"
        return "definite" if 1.0 + float((self.values - self.bounds).min()) / shift > 0 else "undecided"

    def definite_shift(self) -> float:
        """Return the smallest shift for which `A` is at least :data:`MARGIN` times the identity; 0 if all do."""
        return max(0.0, -float((self.values - self.bounds).min()) / (1.0 - MARGIN))


class CachedOperator(LinearOperator):
    """An operator with another shift that caches the products with `H`.

    Solvers that differ only in their iterations or damping ask for many products twice.

    Args:
        cache: products by the digest of their vector; operators with different shifts can share it.
    """

    def __init__(self, operator: LinearOperator, shift: float, cache: dict[bytes, Tensor] | None = None) -> None:
        super().__init__(operator.block_sizes, shift)
        self.operator = operator
        self.cache = {} if cache is None else cache

    def hessian_product(self, u: Tensor) -> Tensor:
        """Return `H @ u` for a flat (P,) vector."""
        key = hashlib.blake2b(u.detach().cpu().numpy().tobytes()).digest()
        if key not in self.cache:
            self.cache[key] = self.operator.hessian_product(u)
        return self.cache[key].clone()  # the caller may change it in place


def symmetry_error(operator: LinearOperator, u: Tensor, w: Tensor) -> float:
    """Return `|u'Hw - w'Hu| / (||u|| ||Hw||)`; about `1 / sqrt(P)` for random vectors (P,) and an asymmetric matrix."""
    hu, hw = (operator.hessian_product(vector).double() for vector in (u, w))
    u, w = u.double(), w.double()
    size = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(hw)
    return float((u @ hw - w @ hu).abs() / size) if size > 0 else 0.0


def spectrum(operator: LinearOperator, v: Tensor, steps: int, seed: int = 0) -> Spectrum:
    """Return the Ritz values of `steps` Lanczos steps from `v` (P,) and as many from a random vector.

    A Krylov solver sees the spectrum from `v`; the random vector finds extreme eigenvalues that `v` is orthogonal to.

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
    result = Spectrum(*space.ritz_values())
    space.clear()
    return result


def automatic_shift(operator: LinearOperator, v: Tensor, solver: Solver, lam: float) -> float:
    """Return lambda + delta as "auto" chooses it in the first alternation for this solver's limit and tolerance."""
    operator.subspace.clear()
    limit, tolerance = getattr(solver, "iterations", 0), getattr(solver, "tolerance", 0)
    shift, _ = choose_shift(operator, v, limit or 5, tolerance if tolerance > 0 else TOLERANCE, lam)
    operator.subspace.clear()
    return shift


# ------------------------------------------------------------------------------------------------ convergence


@dataclass(frozen=True)
class Point:
    """The result of a solver with a budget of products, None if it has none.

    Attributes:
        products: number of products it reports.
        residual: `||v - A x|| / ||v||`, computed with a new product.
        status: status it reports.
    """

    budget: int | None
    products: int
    residual: float
    status: str


def budgets_up_to(limit: int) -> list[int]:
    """Return 1, 2, 3, 5, 8, ... (Fibonacci numbers) and the limit."""
    budgets = [1, 2]
    while budgets[-1] < limit:
        budgets.append(budgets[-1] + budgets[-2])
    return [*(n for n in budgets if n < limit), limit]


def budget_key(solver: Solver) -> str | None:
    """Return the name of the solver's argument that limits its products, or None."""
    names = [field.name for field in dataclasses.fields(solver)] if dataclasses.is_dataclass(solver) else []
    return next((key for key in ("iterations", "rank") if key in names), None)


def is_too_large(solver: Solver, size: int) -> bool:
    """Return True if the solver does not accept a system with `size` unknowns."""
    return size > getattr(solver, "max_size", size)


def solve(operator: CachedOperator, v: Tensor, solver: Solver, budget: int | None) -> tuple[Point, Tensor]:
    """Solve from an empty subspace and measure the residual with a product that is not cached."""
    operator.subspace.clear()
    solution = solver(operator, v)
    operator.subspace.clear()
    product = solution.x + operator.operator.hessian_product(solution.x) / operator.shift
    residual, size = (torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in (v - product, v))
    return Point(budget, solution.products, float(residual / size), solution.status), solution.x


def convergence(operator: CachedOperator, v: Tensor, solver: Solver, budgets: list[int]) -> tuple[list[Point], Tensor]:
    """Return the result with each budget, without a stop by the tolerance, and the solution of the last one."""
    key = budget_key(solver)
    if key is None:
        point, x = solve(operator, v, solver, None)
        return [point], x
    points = []
    for budget in budgets:
        point, x = solve(operator, v, dataclasses.replace(solver, **{key: budget, "tolerance": 1e-12}), budget)
        points.append(point)
    return points, x


def compare_solvers(
    candidates: Mapping[str, Solver],
    operator: LinearOperator,
    v: Tensor,
    lam: float,
    shifts: Sequence[float],
    max_products: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run every solver at every shift.

    Returns:
        A row per solver and shift with its `points` and the cosines of its solution to `v` and to the best solution;
        the reasons for skipped solvers by name.
    """
    skipped = {
        other: f"{len(v)} parameters exceed its max_size of {candidate.max_size}"
        for other, candidate in candidates.items()
        if is_too_large(candidate, len(v))
    }
    rows: list[tuple[dict[str, Any], Tensor]] = []
    for other in [other for other in candidates if other not in skipped]:
        cache: dict[bytes, Tensor] = {}
        for shift in shifts:
            logger.info(f"   {other} at damping {shift - lam:.4g}")
            cached = CachedOperator(operator, shift, cache)
            points, x = convergence(cached, v, candidates[other], budgets_up_to(max_products))
            row = {"solver": other, "damping": shift - lam, "points": [dataclasses.asdict(p) for p in points]}
            rows.append((row, x))
    for row, x in rows:
        same = [(r, y) for r, y in rows if r["damping"] == row["damping"]]
        _, best = min(same, key=lambda pair: pair[0]["points"][-1]["residual"])
        for key, y in (("cosine_to_v", v), ("cosine_to_best", best)):
            row[key] = float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=0))
    return [row for row, _ in rows], skipped


# ------------------------------------------------------------------------------------------------ advice


@dataclass(frozen=True)
class Advice:
    """Advice on the configured solver.

    Attributes:
        sentence: the result and the advice in words.
        converges: True if the solver reaches its tolerance within its limit.
        changes: changes of its arguments, each of which makes it converge; `name` is another solver with the limit,
            the tolerance and the damping of the configured one, or its defaults if that has none.
    """

    sentence: str
    converges: bool
    changes: list[dict[str, Any]]


def advise(
    operator: LinearOperator,
    v: Tensor,
    name: str,
    solver: Solver,
    shift: float,
    lam: float,
    ritz: Spectrum,
    rivals: Mapping[str, Solver],
    max_products: int,
) -> Advice:
    """Check whether the configured solver solves this system; if not, search for changes that do. Each one is tried.

    Args:
        name: name of the solver for the sentence.
        shift: lambda plus the damping in use.
        ritz: spectrum of the system.
        rivals: other solvers by name.
        max_products: largest limit of products to try.
    """
    trials = _Trials(operator, v, lam)
    state = ritz.definiteness(shift)
    words = {"definite": "positive definite", "undecided": "not known to be definite"}.get(state, state)
    system = f"At damping {shift - lam:.4g} the system is {words} (smallest Ritz value {ritz.smallest(shift):.3g})"
    if is_too_large(solver, len(v)):
        verdict = f"{name} does not accept {len(v)} parameters (max_size={solver.max_size})"
    else:
        point, tolerance = trials.solve(solver, shift), _tolerance(solver)
        result = f"residual {point.residual:.2g} after {point.products} products ({point.status})"
        if point.residual <= tolerance:
            sentence = f"{system}, and {name} converges: {result}, tolerance {tolerance:g}."
            if state == "indefinite":
                enough = _round_up(ritz.definite_shift() - lam)
                sentence += f" But the lower level is not at a minimum; damping={enough:g} makes the system definite."
            return Advice(sentence, True, [])
        verdict = f"{name} does not converge within its limit: {result}, tolerance {tolerance:g}"
    changes = _find_changes(trials, solver, shift, rivals, max_products)
    options = ", or ".join(_format(change) for change in changes)
    todo = f"Changes that make it converge: {options}" if changes else f"No change with {max_products} products does"
    return Advice(f"{system}, and {verdict}. {todo}.", False, changes)


class _Trials:
    """Solves from an empty subspace that share their cached products."""

    def __init__(self, operator: LinearOperator, v: Tensor, lam: float) -> None:
        self.operator, self.v, self.lam = operator, v, lam
        self.cache: dict[bytes, Tensor] = {}

    def solve(self, solver: Solver, shift: float) -> Point:
        return solve(CachedOperator(self.operator, shift, self.cache), self.v, solver, None)[0]

    def converges(self, solver: Solver, shift: float, change: dict[str, Any]) -> bool:
        residual = self.solve(solver, shift).residual
        logger.info(f"   tried {_format(change)}: residual {residual:.2g}")
        return residual <= _tolerance(solver)

    def sufficient_damping(self, solver: Solver, shift: float, change: dict[str, Any]) -> list[dict[str, Any]]:
        """Return `change` with the first damping that suffices, searched upwards from the automatic one."""
        start = max(automatic_shift(self.operator, self.v, solver, self.lam), shift * 1.01) - self.lam
        # in half octaves near the automatic choice, in whole ones far above it
        for octaves in [*(n / 2 for n in range(8)), *range(4, 24)]:
            damping = _round_up(start * 2.0**octaves)
            if self.converges(solver, self.lam + damping, candidate := {**change, "damping": damping}):
                return [candidate]
        return []


def _find_changes(
    trials: _Trials, solver: Solver, shift: float, rivals: Mapping[str, Solver], max_products: int
) -> list[dict[str, Any]]:
    key = budget_key(solver)
    changes: list[dict[str, Any]] = []
    others = {}
    for name, rival in rivals.items():
        if other_key := budget_key(rival):
            limits = {other_key: getattr(solver, key), "tolerance": _tolerance(solver)} if key else {}
            others[name] = dataclasses.replace(rival, **limits)
    if key:
        changes += trials.sufficient_damping(solver, shift, {})
        for budget in (n for n in budgets_up_to(max_products) if n > getattr(solver, key)):
            if trials.converges(dataclasses.replace(solver, **{key: budget}), shift, {key: budget}):
                changes.append({key: budget})
                break
    changes += [{"name": name} for name, rival in others.items() if trials.converges(rival, shift, {"name": name})]
    if not changes and others:
        name, rival = next(iter(others.items()))
        changes += trials.sufficient_damping(rival, shift, {"name": name})
    return changes


def _tolerance(solver: Solver) -> float:
    return getattr(solver, "tolerance", 0) or TOLERANCE


def _format(change: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in change.items()
    )


def _round_up(value: float, digits: int = 2) -> float:
    exponent = math.floor(math.log10(value)) - digits + 1
    return float(f"{math.ceil(value / 10.0**exponent)}e{exponent}")
