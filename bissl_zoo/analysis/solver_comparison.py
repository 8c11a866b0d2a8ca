"""Every solver on one system, and how long that takes."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bissl_zoo.analysis.solver_diagnosis import Remembering, budget_key, budgets_up_to, convergence, refuses
from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.registry import SOLVERS

logger = logging.getLogger(__name__)


class Clock:
    """How long a number of products will take.

    Args:
        seconds: of one product.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def eta(self, products: int) -> str:
        """In words."""
        seconds = self.seconds * products
        return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def compare_solvers(
    name: str,
    operator: CurvatureOperator,
    v: Tensor,
    solver: Any,
    lam: float,
    shifts: Sequence[float],
    max_products: int,
    clock: Clock,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every solver at every shift, the configured one with its own settings, from nothing each time."""
    candidates = {name: solver} | {other: entry() for other, entry in SOLVERS if other != name}
    skipped = {
        other: f"{len(v)} parameters are more than its max_size of {candidate.max_size}"
        for other, candidate in candidates.items()
        if refuses(candidate, len(v))
    }
    candidates = {other: candidate for other, candidate in candidates.items() if other not in skipped}
    budgets = budgets_up_to(max_products)
    costs = {other: _cost(candidate, budgets, len(v)) for other, candidate in candidates.items()}
    left = len(shifts) * sum(costs.values())
    found: list[tuple[dict[str, Any], Tensor]] = []
    for other, candidate in candidates.items():
        seen: dict[bytes, Tensor] = {}
        for shift in shifts:
            logger.info(f"   {other} at damping {shift - lam:.4g} ... {clock.eta(left)} for this and the rest")
            points, x = convergence(Remembering(operator, shift, seen), v, candidate, budgets)
            row = {"solver": other, "damping": shift - lam, "points": [dataclasses.asdict(p) for p in points]}
            found.append((row, x))
            left -= costs[other]
    for row, x in found:
        same = [(r, y) for r, y in found if r["damping"] == row["damping"]]
        _, best = min(same, key=lambda pair: pair[0]["points"][-1]["residual"])
        row["cosine_to_v"], row["cosine_to_best"] = (_cosine(x, y) for y in (v, best))
    return [row for row, _ in found], skipped


def _cost(solver: Any, budgets: Sequence[int], size: int) -> int:
    """About how many products `convergence` takes: the longest run, and two residuals each."""
    if budget_key(solver) is not None:
        return budgets[-1] + 2 * len(budgets)
    return size + 2 if hasattr(solver, "max_size") else 1


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
