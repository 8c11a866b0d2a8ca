"""The hook that speaks up when the hypergradient's systems are not being solved."""

import statistics
from collections import Counter, deque
from pathlib import Path
from typing import Any

from bissl_zoo.engine.trainer import HookBase
from bissl_zoo.progress.display import say

#: how a solve may end without a word: solved, or by a solver that solves nothing
FINE = ("converged", "not_solved")


class SolverWatch(HookBase):
    """One warning, as soon as more than half of the last `window` upper steps ended with an unsolved system.

    Args:
        config: of the run, for the command that tells more.
        window: upper steps looked at; fewer are not judged.
    """

    def __init__(self, config: Path, window: int = 24) -> None:
        self.config = config
        self.window = window
        self.recent: deque[dict[str, Any]] = deque(maxlen=window)
        self.warned = False

    def after_step(self) -> None:
        """Look at the upper steps of this alternation."""
        for record in self.trainer.records:
            self.recent.append(record)
            failed = [step for step in self.recent if step["solver/status"] not in FINE]
            if not self.warned and len(self.recent) == self.window and 2 * len(failed) > self.window:
                self.warned = True
                say(self._warning(failed))

    def _warning(self, failed: list[dict[str, Any]]) -> str:
        statuses = Counter(step["solver/status"] for step in failed).most_common()
        residuals = [step["solver/residual"] for step in self.recent if "solver/residual" in step]
        figures = [f"{status} {count}" for status, count in statuses]
        if residuals:
            figures.append(f"median residual {statistics.median(residuals):.2g}")
        figures.append(f"damping {self.recent[-1]['solver/damping']:.4g}")
        return (
            f"warning: {len(failed)} of the last {self.window} solves for the hypergradient failed "
            f"({', '.join(figures)}), so its curvature term is not what it should be. Raise solver.iterations or "
            "solver.damping, or set solver.damping=auto; "
            f"python tools/check_hypergradient.py --config-file {self.config} tells which."
        )
