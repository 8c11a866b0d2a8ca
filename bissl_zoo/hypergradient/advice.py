"""What to change in a solver's settings so that it solves a system; every change is tried before it is told."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bissl_zoo.hypergradient.diagnosis import (
    TOLERANCE,
    Point,
    Remembering,
    Solver,
    Spectrum,
    automatic_strength,
    budget_key,
    budgets_up_to,
    refuses,
    solve_cold,
)
from bissl_zoo.hypergradient.solver import LinearOperator


@dataclass(frozen=True)
class Advice:
    """One sentence on the configured solver, and what to change.

    Attributes:
        converges: whether it reaches its tolerance within its limit.
        remedies: changes of the solver's arguments, each sufficient and tried; `name` is of another solver, which keeps
            limit, tolerance and damping.
    """

    sentence: str
    converges: bool
    remedies: list[dict[str, Any]]


def advise(
    operator: LinearOperator,
    v: Tensor,
    name: str,
    solver: Solver,
    strength: float,
    lam: float,
    found: Spectrum,
    rivals: Mapping[str, Solver],
    most: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Whether the configured solver solves this system, and if not, what would.

    Args:
        name: of the solver, for the sentence.
        strength: lambda plus the damping in use.
        rivals: other solvers by name, to be tried with this limit, tolerance and damping.
        most: products beyond which no larger limit is tried.
        tell: takes a line for each change that was tried, as it takes time.
    """
    seen: dict[bytes, Tensor] = {}
    state, least = found.definiteness(strength), found.least(strength)
    told = {"definite": "positive definite", "undecided": "not known to be definite"}.get(state, state)
    matrix = f"at damping {_short(strength - lam)} the system is {told} (least Ritz value {least:.3g})"
    tolerance = getattr(solver, "tolerance", 0) or TOLERANCE

    def solve(candidate: Solver, at: float) -> Point:
        return solve_cold(Remembering(operator, at, seen), v, candidate, None)[0]

    def solves(candidate: Solver, at: float, change: str) -> bool:
        residual = solve(candidate, at).residual
        tell(f"{change}: residual {residual:.2g}")
        return residual <= tolerance

    if refuses(solver, len(v)):
        verdict = f"{name} refuses {len(v)} parameters (max_size={solver.max_size})"
    else:
        point = solve(solver, strength)
        reached = f"a residual of {point.residual:.2g} after {point.products} products ({point.status})"
        if point.residual <= tolerance:
            todo = "Nothing to change"
            if state == "indefinite":
                enough = _round_up(found.definite_strength() - lam)
                todo = f"But the lower level is at no minimum; damping={enough:g} makes the system definite"
            sentence = f"{matrix}, and {name} converges: {reached}, tolerance {tolerance:g}. {todo}."
            return Advice(_capital(sentence), True, [])
        verdict = f"{name} does not converge within its limit: {reached}, tolerance {tolerance:g}"

    remedies: list[dict[str, Any]] = []
    key = budget_key(solver)
    if key:
        start = max(automatic_strength(operator, v, solver, lam), strength * 1.01) - lam
        # by half an octave near the automatic choice, by whole ones far above it
        dampings = (_round_up(start * 2.0**n) for n in [*(n / 2 for n in range(8)), *range(4, 24)])
        remedies += _first(dampings, "damping", lambda d, change: solves(solver, lam + d, change))
        larger = (n for n in budgets_up_to(most) if n > getattr(solver, key))
        remedies += _first(larger, key, lambda n, change: solves(_changed(solver, key, n), strength, change))
    for other, rival in rivals.items():
        if own := budget_key(rival):
            patient = _changed(rival, own, getattr(solver, key)) if key else rival
            patient = dataclasses.replace(patient, tolerance=tolerance)
            remedies += _first([other], "name", lambda _, change, p=patient: solves(p, strength, change))
    options = ", or ".join(_shown(remedy) for remedy in remedies)
    which = "This makes" if len(remedies) == 1 else "Each of these makes"
    todo = f"{which} it converge: {options}" if remedies else f"Nothing tried with up to {most} products does"
    return Advice(_capital(f"{matrix}, and {verdict}. {todo}."), False, remedies)


def _first(values: Iterable[Any], key: str, works: Callable[[Any, str], bool]) -> list[dict[str, Any]]:
    """The first value that works, as a remedy."""
    found = (value for value in values if works(value, _shown({key: value})))
    return [{key: value} for value in itertools.islice(found, 1)]


def _changed(solver: Solver, key: str, value: int) -> Solver:
    return dataclasses.replace(solver, **{key: value})


def _shown(remedy: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in remedy.items()
    )


def _round_up(value: float, digits: int = 2) -> float:
    exponent = math.floor(math.log10(value)) - digits + 1
    return float(f"{math.ceil(value / 10.0**exponent)}e{exponent}")


def _short(value: float) -> str:
    return f"{value:.4g}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
