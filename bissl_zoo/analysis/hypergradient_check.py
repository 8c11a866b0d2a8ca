"""Whether the hypergradient of a config is right, on a reduced problem, and solved, on the real one."""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from bissl_zoo.analysis.advice import Advice, advise
from bissl_zoo.analysis.reduced_checks import check_reduced, right_hand_side
from bissl_zoo.analysis.reduced_problem import ReducedProblem
from bissl_zoo.analysis.solver_comparison import Clock, compare_solvers
from bissl_zoo.analysis.solver_diagnosis import (
    automatic_shift,
    budget_key,
    spectrum,
    symmetry_error,
)
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.engine.build import Context, Weights, build_part
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.hooks import Progress
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.stages import Bissl, HeadWarmup
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.registry import SOLVERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effort:
    """How far to look.

    Args:
        max_products: largest budget of each solver.
        lanczos_steps: from the right-hand side, and as many from a random vector.
        warmup_steps: most steps of the downstream head's warm-up.
    Raises:
        ConfigError: a number that is too small, by the name of its option.
    """

    max_products: int = 12
    lanczos_steps: int = 12
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        for field, least in (("max_products", 1), ("lanczos_steps", 2), ("warmup_steps", 0)):
            value = getattr(self, field)
            if value < least:
                raise ConfigError(f"--{field.replace('_', '-')} is {value}; it must be {least} or more.")


def open_check(cfg: DictConfig, source: str) -> tuple[Context, Weights]:
    """Refuse what the BiSSL stage of this config would refuse, and load the weights that it would start from."""
    cfg = cfg.copy()
    cfg.train.stages = ["bissl"]
    context = open_context(cfg, source)
    initial, _ = load_init(cfg.train.init, cfg)
    check_parts(context, initial)
    return context, initial


def check_hypergradient(context: Context, initial: Weights, effort: Effort) -> dict[str, Any]:
    """Both parts, with progress lines; returns plain figures: `reduced`, `real`, `advice`, `passed`."""
    reduced = check_on_reduced(context.cfg)
    return {"reduced": reduced, **check_on_real(context, initial, effort), "passed": reduced["passed"]}


def check_on_reduced(cfg: DictConfig) -> dict[str, Any]:
    """Part A: product, hypergradient and solver against finite differences and a direct solve, in float64."""
    logger.info("A. reduced problem: smooth backbone of 47 parameters, float64, the configured pretext method")
    try:
        reduced = ReducedProblem(cfg)
        changes = ", ".join(reduced.changes) or "nothing"
        logger.info(f"   exchanged in the method: {changes}; batch norm in train mode, as in a run")
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
    """Part B: the config's own networks and data, one curvature batch as the BiSSL stage takes it."""
    logger.info("B. real problem: the config's backbone, pretext method, task and data")
    weights, notes = _warm_head(context, initial, effort.warmup_steps)
    notes = _describe_weights(context.cfg, initial) + notes
    for note in notes:
        logger.info(f"   {note}")
    trainer = Bissl().build(context, weights)
    problem = trainer.problem
    try:
        views, batch = next(problem.lower.data_iterator), next(problem.upper.data_iterator)
        v = right_hand_side(problem, batch)
        operator = problem.curvature(views).prepare()
        try:
            figures = _measure(context.cfg.solver, problem, operator, v, effort)
        finally:
            operator.release()
    finally:
        trainer.close()
    figures["real"]["notes"] = notes
    return figures


def _describe_weights(cfg: DictConfig, initial: Weights) -> list[str]:
    if initial.backbone is None:
        return [
            "weights: random. Before any pretraining H is indefinite and large, and the figures below tell little "
            "about the stage; give --run RUN_DIR or train.init."
        ]
    head = "with its pretext head" if initial.pretext is not None else "with a random pretext head"
    return [f"weights: {cfg.train.init}, {head}"]


def _warm_head(context: Context, initial: Weights, most: int) -> tuple[Weights, list[str]]:
    if initial.task is not None:
        return initial, ["downstream head: from the same place"]
    trainer = HeadWarmup().build(context, initial)
    planned = trainer.total_steps
    trainer.total_steps = min(planned, most)
    trainer.train([Progress(period=max(trainer.total_steps, 1))])
    trainer.close()
    return trainer.result(), [f"downstream head: warmed up for {trainer.step} of the {planned} steps configured"]


def _measure(
    section: DictConfig, problem: BiLevel, operator: CurvatureOperator, v: Tensor, effort: Effort
) -> dict[str, Any]:
    name, solver, lam = section.name, problem.solver, problem.lam
    symmetry, clock = _symmetry(operator, v)
    logger.info(
        f"   spectrum of H by 2 x {effort.lanczos_steps} Lanczos steps ... {clock.eta(2 * effort.lanczos_steps)}"
    )
    try:
        found = spectrum(operator, v, effort.lanczos_steps)
    except ValueError as error:
        raise BisslZooError(f"{error} Look at the weights and the first batches.") from error
    automatic = automatic_shift(operator, v, solver, lam)
    used = automatic if solver.damping == "auto" else lam + solver.damping
    low, high = (f"{found.values[i]:.4g} +- {found.bounds[i]:.2g}" for i in (0, -1))
    logger.info(f"   H from {low} to {high}; automatic damping {automatic - lam:.4g}, configured {solver.damping}")
    logger.info(f"   at damping {used - lam:.4g} the system is {found.definiteness(used)}")
    shifts = [used] if abs(automatic - used) <= 0.01 * used else [used, automatic]
    rows, skipped = compare_solvers(name, operator, v, solver, lam, shifts, effort.max_products, clock)
    rivals = {other: entry() for other, entry in SOLVERS if other != name}
    logger.info("   what to advise")
    advice = advise(
        operator,
        v,
        name,
        solver,
        used,
        lam,
        found,
        rivals,
        effort.max_products,
        lambda line: logger.info(f"   tried {line}"),
    )
    return {
        "real": {
            "parameters": len(v),
            "lambda": lam,
            "seconds_per_product": clock.seconds,
            "symmetry": symmetry,
            "spectrum": {"values": found.values.tolist(), "bounds": found.bounds.tolist()},
            "damping": {"configured": solver.damping, "used": used - lam, "automatic": automatic - lam},
            "definiteness": [{"damping": s - lam, "state": found.definiteness(s)} for s in shifts],
            "tolerance": getattr(solver, "tolerance", None),
            "solvers": rows,
            "skipped": skipped,
        },
        "advice": {**dataclasses.asdict(advice), "overrides": _overrides(section, advice)},
    }


def _symmetry(operator: CurvatureOperator, v: Tensor) -> tuple[dict[str, Any], Clock]:
    """The error and its limit, and how long a product takes."""
    size = len(v)
    drawn = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=v.dtype).to(v.device)
    operator.hessian_product(drawn[2])  # the first may take longer
    start = time.perf_counter()
    error = symmetry_error(operator, *drawn[:2])
    clock = Clock((time.perf_counter() - start) / 2)
    limit = 1e-2 / math.sqrt(size)  # a matrix that is not symmetric has about 1 / sqrt(P)
    verdict = "symmetric" if error <= limit else "NOT SYMMETRIC"
    logger.info(f"   {size} parameters, {clock.seconds:.2g} s per product")
    logger.info(f"   |u'Hw - w'Hu| / (|u| |Hw|) = {error:.1e} (limit {limit:.1e}): {verdict}")
    return {"error": error, "limit": limit, "passed": error <= limit}, clock


def _overrides(section: DictConfig, advice: Advice) -> list[list[str]]:
    """The remedies as overrides of the command line, keys that another solver does not take removed."""
    found = []
    for remedy in advice.remedies:
        if "name" not in remedy:
            found.append([f"solver.{key}={value}" for key, value in remedy.items()])
            continue
        entry = SOLVERS.get(remedy["name"])
        taken = {field.name for field in dataclasses.fields(entry)}
        own = budget_key(build_part(section))
        words = [f"solver.{key}={value}" for key, value in remedy.items()]
        words += [f"~solver.{key}" for key in section if key not in {*taken, "name", "_target_"}]
        if own and budget_key(entry()) not in section:
            words.append(f"+solver.{budget_key(entry())}={getattr(build_part(section), own)}")
        found.append(words)
    return found
