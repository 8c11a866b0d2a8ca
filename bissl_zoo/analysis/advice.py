"""What to change in a solver's settings so that it solves a system; every change is tried before it is told."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bissl_zoo.analysis.solver_diagnosis import (
    TOLERANCE,
    Point,
    Remembering,
    Solver,
    Spectrum,
    automatic_shift,
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
        remedies: changes of the solver's arguments, each sufficient and tried; `name` is of another solver, with the
            limit, the tolerance and the damping of the configured one, or its own where that has none.
    """

    sentence: str
    converges: bool
    remedies: list[dict[str, Any]]


def advise(
    operator: LinearOperator,
    v: Tensor,
    name: str,
    solver: Solver,
    shift: float,
    lam: float,
    found: Spectrum,
    rivals: Mapping[str, Solver],
    most: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Whether the configured solver solves this system, and if not, what would.

    Args:
        name: of the solver, for the sentence.
        shift: lambda plus the damping in use.
        rivals: other solvers by name.
        most: products beyond which no larger limit is tried.
        tell: takes a line for each change that was tried, as it takes time.
    """
    trials = _Trials(operator, v, lam, tell)
    state, least = found.definiteness(shift), found.least(shift)
    told = {"definite": "positive definite", "undecided": "not known to be definite"}.get(state, state)
    matrix = f"at damping {shift - lam:.4g} the system is {told} (least Ritz value {least:.3g})"
    if refuses(solver, len(v)):
        verdict = f"{name} refuses {len(v)} parameters (max_size={solver.max_size})"
    else:
        point, tolerance = trials.solve(solver, shift), _tolerance(solver)
        reached = f"a residual of {point.residual:.2g} after {point.products} products ({point.status})"
        if point.residual <= tolerance:
            todo = "Nothing to change"
            if state == "indefinite":
                enough = _round_up(found.definite_shift() - lam)
                todo = f"But the lower level is at no minimum; damping={enough:g} makes the system definite"
            sentence = f"{matrix}, and {name} converges: {reached}, tolerance {tolerance:g}. {todo}."
            return Advice(_capital(sentence), True, [])
        verdict = f"{name} does not converge within its limit: {reached}, tolerance {tolerance:g}"
    remedies = _remedies(trials, solver, shift, rivals, most)
    options = ", or ".join(_shown(remedy) for remedy in remedies)
    which = "This makes" if len(remedies) == 1 else "Each of these makes"
    todo = f"{which} it converge: {options}" if remedies else f"Nothing tried with up to {most} products does"
    return Advice(_capital(f"{matrix}, and {verdict}. {todo}."), False, remedies)


class _Trials:
    """Solves from nothing that share their products; each is told."""

    def __init__(self, operator: LinearOperator, v: Tensor, lam: float, tell: Callable[[str], None]) -> None:
        self.operator, self.v, self.lam, self.tell = operator, v, lam, tell
        self.seen: dict[bytes, Tensor] = {}

    def solve(self, solver: Solver, shift: float) -> Point:
        return solve_cold(Remembering(self.operator, shift, self.seen), self.v, solver, None)[0]

    def solves(self, solver: Solver, shift: float, change: dict[str, Any]) -> bool:
        residual = self.solve(solver, shift).residual
        self.tell(f"{_shown(change)}: residual {residual:.2g}")
        return residual <= _tolerance(solver)

    def damping(self, solver: Solver, shift: float, change: dict[str, Any]) -> list[dict[str, Any]]:
        """The change with the first damping of two digits that is enough, from the automatic choice upwards."""
        start = max(automatic_shift(self.operator, self.v, solver, self.lam), shift * 1.01) - self.lam
        # by half an octave near the automatic choice, by whole ones far above it
        for octaves in [*(n / 2 for n in range(8)), *range(4, 24)]:
            damping = _round_up(start * 2.0**octaves)
            if self.solves(solver, self.lam + damping, tried := {**change, "damping": damping}):
                return [tried]
        return []


def _remedies(
    trials: _Trials, solver: Solver, shift: float, rivals: Mapping[str, Solver], most: int
) -> list[dict[str, Any]]:
    key = budget_key(solver)
    found: list[dict[str, Any]] = []
    patient = {}
    for name, rival in rivals.items():
        if own := budget_key(rival):
            limits = {own: getattr(solver, key), "tolerance": _tolerance(solver)} if key else {}
            patient[name] = dataclasses.replace(rival, **limits)
    if key:
        found += trials.damping(solver, shift, {})
        for budget in (n for n in budgets_up_to(most) if n > getattr(solver, key)):
            if trials.solves(dataclasses.replace(solver, **{key: budget}), shift, {key: budget}):
                found.append({key: budget})
                break
    found += [{"name": name} for name, rival in patient.items() if trials.solves(rival, shift, {"name": name})]
    if not found and patient:
        name, rival = next(iter(patient.items()))
        found += trials.damping(rival, shift, {"name": name})
    return found


def _tolerance(solver: Solver) -> float:
    return getattr(solver, "tolerance", 0) or TOLERANCE


def _shown(remedy: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in remedy.items()
    )


def _round_up(value: float, digits: int = 2) -> float:
    exponent = math.floor(math.log10(value)) - digits + 1
    return float(f"{math.ceil(value / 10.0**exponent)}e{exponent}")


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
