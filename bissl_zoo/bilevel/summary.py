"""Summary of the hypergradients of a stage: close to the plain gradient, turned by curvature, or amplified."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

#: a cosine between `x` and `v` above this is joint training
JOINT = 0.98
#: `||x|| / ||v||` above this is an artefact of negative curvature: at a minimum of the lower level `||x|| <= ||v||`
AMPLIFIED = 1.01


class HypergradientSummary:
    """Collect `cos(x, v)` and `||x|| / ||v||` of the upper steps of a stage."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.ratios: list[float] = []

    def update(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the metrics of upper steps; records of steps that were undone are empty and are skipped."""
        for record in records:
            if "solver/cos_xv" in record:
                self.cosines.append(record["solver/cos_xv"])
                self.ratios.append(record["solver/norm_ratio"])

    def state_dict(self) -> dict[str, list[float]]:
        """Return both lists."""
        return {"cosines": list(self.cosines), "ratios": list(self.ratios)}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Continue with the lists of `state_dict`."""
        self.cosines, self.ratios = list(state["cosines"]), list(state["ratios"])

    def sentence(self) -> str:
        """Return one sentence about the stage, empty before the first upper step."""
        if not self.cosines:
            return ""
        count = len(self.cosines)
        cosine, ratio = statistics.median(self.cosines), statistics.median(self.ratios)
        amplified = sum(value > AMPLIFIED for value in self.ratios)
        if amplified > 0.1 * count:
            return (
                f"The solver amplified negative curvature: |x| > |v| in {amplified} of {count} upper steps (median "
                f"|x|/|v| {ratio:.2f}). Use bilevel.curvature=gauss_newton or more damping."
            )
        if cosine > JOINT:
            return (
                f"The hypergradient was nearly the plain gradient (median cos(x, v) {cosine:.3f} over {count} upper "
                "steps): this stage was joint training. Lower solver.damping or bilevel.lambda for more curvature."
            )
        degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        return (
            f"Curvature turned the gradient by {degrees:.0f} degrees and scaled it by {ratio:.2f} (medians of {count} "
            "upper steps)."
        )
