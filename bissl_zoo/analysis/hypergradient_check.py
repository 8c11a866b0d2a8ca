"""Check the hypergradient of a config on a reduced problem, and its solver on the config's own networks and data."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor

from bissl_zoo.analysis.reduced_problem import ReducedProblem, check_reduced, right_hand_side
from bissl_zoo.analysis.solver_diagnosis import (
    TOLERANCE,
    Row,
    recommend,
    solve_all,
    spectrum,
    sufficient_shift,
    symmetry_error,
)
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.engine.build import Context, Weights, build_part
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.hooks import Progress
from bissl_zoo.engine.init import adopt_pixels, load_init
from bissl_zoo.engine.stages import Bissl, HeadWarmup
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.files import write_atomically
from bissl_zoo.hypergradient import GraphOperator
from bissl_zoo.registry import SOLVERS

logger = logging.getLogger(__name__)

#: right-hand sides that are solved per curvature and solver
MAX_RIGHT_HAND_SIDES = 4


@dataclasses.dataclass(frozen=True)
class Effort:
    """Limits of the check.

    Args:
        max_products: number of Lanczos steps from the right-hand side, and from a random vector.
        warmup_steps: largest number of steps to warm up the downstream head.
    Raises:
        ConfigError: a number that is too small.
    """

    max_products: int = 12
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        for name, minimum in (("max_products", 2), ("warmup_steps", 0)):
            if getattr(self, name) < minimum:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is {getattr(self, name)}; it must be at least {minimum}.")


def open_check(cfg: DictConfig, source: str) -> tuple[Context, Weights]:
    """Check the config as the BiSSL stage does and load the weights that the stage would start from."""
    cfg = cfg.copy()
    cfg.train.stages = ["bissl"]
    context = open_context(cfg, source)
    initial, _ = load_init(cfg.train.init, cfg)
    adopt_pixels(cfg, initial.pixels)
    check_parts(context, initial)
    return context, initial


def check_hypergradient(context: Context, initial: Weights, effort: Effort) -> dict[str, Any]:
    """Run both parts of the check; return plain values: `reduced`, `real`, `advice`, `passed`."""
    reduced = check_on_reduced(context.cfg)
    return {"reduced": reduced, **check_on_real(context, initial, effort), "passed": reduced["passed"]}


def check_on_reduced(cfg: DictConfig) -> dict[str, Any]:
    """Part A: product, hypergradient and solver against finite differences and a direct solve, in float64."""
    logger.info("A. reduced problem: smooth backbone with 47 parameters, float64, the configured pretext method")
    try:
        reduced = ReducedProblem(cfg)
        logger.info(f"   changes in the method: {', '.join(reduced.changes) or 'none'}; batch norm in train mode")
        checks = check_reduced(reduced, cfg.solver.name, build_part(cfg.solver))
    except BisslZooError as error:
        logger.info(f"   FAIL  {error}")
        return {"passed": False, "error": str(error), "checks": []}
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        logger.info(f"   {verdict}  {check.name}: {check.error:.1e} (limit {check.limit:.1e}); {check.detail}")
    return {
        "passed": all(check.passed for check in checks),
        "changes": reduced.changes,
        "lambda": reduced.problem.lam,
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
    }


def check_on_real(context: Context, initial: Weights, effort: Effort) -> dict[str, Any]:
    """Part B: the networks and data of the config, on one curvature batch as the BiSSL stage uses it."""
    logger.info("B. real problem: backbone, pretext method, task and data of the config")
    if initial.backbone is None:
        notes = [
            "weights: random. Before pretraining H is large and indefinite, so the results below do not represent the "
            "BiSSL stage. Use --run RUN_DIR or train.init."
        ]
    else:
        head = "with its pretext head" if initial.pretext is not None else "with a random pretext head"
        notes = [f"weights: {context.cfg.train.init}, {head}"]
    weights, note = _warm_up_head(context, initial, effort.warmup_steps)
    notes.append(note)
    for note in notes:
        logger.info(f"   {note}")
    trainer = Bissl().build(context, weights)
    problem = trainer.problem
    try:
        result = _compare(context.cfg, problem, effort)
    finally:
        trainer.close()
    result["real"]["notes"] = notes
    return result


def _warm_up_head(context: Context, initial: Weights, max_steps: int) -> tuple[Weights, str]:
    if initial.task is not None:
        return initial, "downstream head: from the same weights"
    trainer = HeadWarmup().build(context, initial)
    planned = trainer.total_steps
    trainer.total_steps = min(planned, max_steps)
    trainer.train([Progress(period=max(trainer.total_steps, 1))])
    trainer.close()
    return trainer.result(), f"downstream head: warmed up for {trainer.step} of {planned} configured steps"


def _compare(cfg: DictConfig, problem: BiLevel, effort: Effort) -> dict[str, Any]:
    """Run all solvers with all curvatures on the right-hand sides of an alternation, and recommend one."""
    name, lam, lower, upper = cfg.solver.name, problem.lam, problem.lower, problem.upper
    tolerance = getattr(problem.solver, "tolerance", 0) or TOLERANCE
    solvers = {name: problem.solver} | {other: _rival(entry(), tolerance) for other, entry in SOLVERS if other != name}
    skipped = {other: _unsuited(solver, problem) for other, solver in solvers.items()}
    solvers = {other: solver for other, solver in solvers.items() if not skipped[other]}
    # the state of the first alternation: an optimizer that pretrained may have left another curvature
    problem.solver = _Observers(problem.solver.damping, solvers.values())
    seconds = time.perf_counter()
    problem.lower_phase()
    count = min(problem.upper_steps, MAX_RIGHT_HAND_SIDES)
    identity = (time.perf_counter() - seconds) * count / problem.upper_steps
    seconds = time.perf_counter()
    right_hand_sides = [right_hand_side(problem, next(upper.data_iterator)) for _ in range(count)]
    identity += (2 if problem.gamma else 1) * (time.perf_counter() - seconds)
    views = next(lower.data_iterator)
    configured = problem.curvature_matrix
    curvatures = [configured] + [c for c in ("gauss_newton", "hessian") if c != configured]
    curvatures = curvatures if hasattr(lower.head, "outer") else ["hessian"]
    rows: list[Row] = []
    matrices = {}
    at_least = lam + (problem.time_constant or 0.0)
    for curvature in curvatures:
        problem.curvature_matrix = curvature
        operator = problem.curvature(views).prepare()
        shift = operator.shift
        try:
            matrices[curvature] = _describe(curvature, operator, right_hand_sides[0], effort.max_products)
            without_products = {row.solver for row in rows if not row.products}
            for other, solver in solvers.items():
                if other in without_products:  # it does not depend on the curvature
                    continue
                fields = solve_all(operator, shift, solver, right_hand_sides, lam, at_least)
                rows.append(Row(curvature, other, **fields, time=1.0 + fields["seconds"] / identity))
            if curvature == curvatures[0]:
                enough = sufficient_shift(operator, right_hand_sides[0], effort.max_products, tolerance, lam) - lam
        finally:
            operator.release()
    problem.curvature_matrix = configured
    best, sentence = recommend(rows, tolerance)
    advised = _overrides(cfg, best)
    if best is None:
        sentence += f" Damping {enough:.3g} is enough for {effort.max_products} products."
        advised = [f"solver.damping={enough:.3g}"]
    return {
        "real": {
            "curvature": configured,
            "parameters": len(right_hand_sides[0]),
            "right_hand_sides": count,
            "lambda": lam,
            "tolerance": tolerance,
            "matrices": matrices,
            "solvers": [dataclasses.asdict(row) for row in rows],
            "skipped": {other: reason for other, reason in skipped.items() if reason},
        },
        "advice": {"sentence": sentence, "overrides": advised},
    }


def _rival(solver: Any, tolerance: float) -> Any:
    """Return the solver with the tolerance of the configured one, if it has one."""
    return dataclasses.replace(solver, tolerance=tolerance) if hasattr(solver, "tolerance") else solver


def _unsuited(solver: Any, problem: BiLevel) -> str:
    """Return why a solver cannot be compared here, or an empty text; attach it to the lower optimizer if it asks."""
    size = sum(parameter.numel() for parameter in problem.lower.backbone_parameters)
    limit = getattr(solver, "max_size", size)
    if size > limit:
        return f"{size} parameters exceed its max_size of {limit}"
    try:
        if hasattr(solver, "attach") and solver is not problem.solver:
            solver.attach(problem.lower.optimizer, problem.lower.backbone_parameters)
    except ValueError as error:
        return str(error)
    return ""


class _Observers:
    """Pass the gradients of the lower steps to all solvers that use them."""

    def __init__(self, damping: Any, solvers: Iterable[Any]) -> None:
        self.damping, self.solvers = damping, list(solvers)

    def start_alternation(self, lower_steps: int) -> None:
        for solver in self.solvers:
            if hasattr(solver, "start_alternation"):
                solver.start_alternation(lower_steps)

    def observe_lower_gradient(self, gradients: Mapping[str, Tensor]) -> None:
        for solver in self.solvers:
            if hasattr(solver, "observe_lower_gradient"):
                solver.observe_lower_gradient(gradients)


def _describe(curvature: str, operator: GraphOperator, v: Tensor, steps: int) -> dict[str, Any]:
    """Return symmetry, seconds per product and spectrum of a curvature."""
    symmetry, seconds = _check_symmetry(operator, v)
    try:
        values, bounds = spectrum(operator, v, steps)
    except ValueError as error:
        raise BisslZooError(f"{error} Check the weights and the first batches.") from error
    low, high = (f"{values[i]:.4g} +- {bounds[i]:.2g}" for i in (0, -1))
    logger.info(f"   {curvature}: {seconds:.2g} s per product, {len(v)} parameters, spectrum from {low} to {high}")
    spectral = {"values": values.tolist(), "bounds": bounds.tolist()}
    return {"symmetry": symmetry, "seconds_per_product": seconds, "spectrum": spectral}


def _check_symmetry(operator: GraphOperator, v: Tensor) -> tuple[dict[str, Any], float]:
    """Return the symmetry error with its limit, and the seconds of a product."""
    vectors = torch.randn(3, len(v), generator=torch.Generator().manual_seed(0), dtype=v.dtype).to(v.device)
    operator.hessian_product(vectors[2])  # the first one may take longer
    start = time.perf_counter()
    error = symmetry_error(operator, *vectors[:2])
    seconds = (time.perf_counter() - start) / 2
    limit = 1e-2 / math.sqrt(len(v))  # an asymmetric matrix has about 1 / sqrt(P)
    verdict = "symmetric" if error <= limit else "NOT SYMMETRIC"
    logger.info(f"   |u'Hw - w'Hu| / (|u| |Hw|) = {error:.1e} (limit {limit:.1e}): {verdict}")
    return {"error": error, "limit": limit, "passed": error <= limit}, seconds


def _overrides(cfg: DictConfig, best: Row | None) -> list[str]:
    """Return the command-line overrides that change the config to the recommended curvature and solver."""
    if best is None:
        return []
    overrides = []
    if best.curvature != cfg.bilevel.curvature and best.solver != "identity":
        overrides.append(f"bilevel.curvature={best.curvature}")
    if best.solver != cfg.solver.name:
        damping = f", damping: {cfg.solver.damping}" if "damping" in cfg.solver and best.solver != "identity" else ""
        overrides.append(f"solver={{_target_: {cfg.solver._target_}, name: {best.solver}{damping}}}")
    return overrides


# ------------------------------------------------------------------------------------------------ report


def save(result: dict[str, Any], folder: Path) -> None:
    """Write `check.json`."""
    write_atomically(folder / "check.json", json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace infinity and NaN by strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(real: dict[str, Any]) -> str:
    """Return a table with a line per curvature and solver."""
    keys = ("curvature", "solver", "damping", "products", "residual", "cos_xv", "norm_ratio", "time", "status")
    formats = {"damping": ".4g", "residual": ".2g", "cos_xv": ".3f", "norm_ratio": ".3f", "time": ".2f"}
    rows = [[format(row[key], formats.get(key, "")) for key in keys] for row in real["solvers"]]
    headers = [*keys[:5], "cos(x, v)", "|x|/|v|", "time / identity", "status"]
    skipped = [f"{name} skipped: {reason}" for name, reason in real["skipped"].items()]
    title = f"{real['right_hand_sides']} right-hand sides of an alternation; the largest residual and |x|/|v|"
    return "\n".join([title, tabulate(rows, headers=headers, disable_numparse=True), *skipped])
