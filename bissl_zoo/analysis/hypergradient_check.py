"""Check the hypergradient of a config on a reduced problem, and its solver on the config's own networks and data."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor

from bissl_zoo.analysis.reduced_problem import ReducedProblem, check_reduced, right_hand_side
from bissl_zoo.analysis.solver_diagnosis import (
    Advice,
    advise,
    automatic_shift,
    budget_key,
    budgets_up_to,
    compare_solvers,
    spectrum,
    symmetry_error,
)
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.distributed import all_reduce_mean
from bissl_zoo.engine.build import Context, Weights, build_part
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.hooks import Progress
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.stages import Bissl, HeadWarmup
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.files import write_atomically
from bissl_zoo.hypergradient import GraphOperator, frozen_state
from bissl_zoo.optim import effective_learning_rate
from bissl_zoo.registry import SOLVERS

logger = logging.getLogger(__name__)

#: colours of Okabe and Ito, which differ with any colour vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*P"


@dataclasses.dataclass(frozen=True)
class Effort:
    """Limits of the check.

    Args:
        max_products: largest budget of each solver.
        lanczos_steps: number of steps from the right-hand side, and from a random vector.
        warmup_steps: largest number of steps to warm up the downstream head.
    Raises:
        ConfigError: a number that is too small.
    """

    max_products: int = 12
    lanczos_steps: int = 12
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        for name, minimum in (("max_products", 1), ("lanczos_steps", 2), ("warmup_steps", 0)):
            if getattr(self, name) < minimum:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} is {getattr(self, name)}; it must be at least {minimum}.")


def open_check(cfg: DictConfig, source: str) -> tuple[Context, Weights]:
    """Check the config as the BiSSL stage does and load the weights that the stage would start from."""
    cfg = cfg.copy()
    cfg.train.stages = ["bissl"]
    context = open_context(cfg, source)
    initial, _ = load_init(cfg.train.init, cfg)
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
    optimizer = problem.lower.optimizer
    if isinstance(optimizer, torch.optim.SGD):  # that of other optimizers is only known after a step
        problem.time_constant = 1.0 / (effective_learning_rate(optimizer) * problem.lower_steps)
    try:
        views, batch = next(problem.lower.data_iterator), next(problem.upper.data_iterator)
        v = right_hand_side(problem, batch)
        operator = problem.curvature(views).prepare()
        try:
            result = _measure(context.cfg.solver, problem, operator, v, effort)
        finally:
            operator.release()
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


def _measure(
    section: DictConfig, problem: BiLevel, operator: GraphOperator, v: Tensor, effort: Effort
) -> dict[str, Any]:
    name, solver, lam = section.name, problem.solver, problem.lam
    symmetry, seconds = _check_symmetry(operator, v)
    # for each solver the longest run and two residuals per budget, at two dampings
    products = 2 * effort.lanczos_steps + 2 * len(SOLVERS.list()) * (
        effort.max_products + 2 * len(budgets_up_to(effort.max_products))
    )
    logger.info(f"   {len(v)} parameters, {seconds:.2g} s per product; about {products * seconds / 60:.1f} min to go")
    try:
        ritz = spectrum(operator, v, effort.lanczos_steps)
    except ValueError as error:
        raise BisslZooError(f"{error} Check the weights and the first batches.") from error
    gauss_newton = problem.curvature_matrix == "gauss_newton"
    automatic = lam + (problem.time_constant or 1.0) if gauss_newton else automatic_shift(operator, v, solver, lam)
    used = operator.shift or automatic
    low, high = (f"{ritz.values[i]:.4g} +- {ritz.bounds[i]:.2g}" for i in (0, -1))
    matrix = "Gauss-Newton matrix" if gauss_newton else "Hessian"
    logger.info(
        f"   {matrix} from {low} to {high}; automatic damping {automatic - lam:.4g}, configured {solver.damping}"
    )
    logger.info(f"   at damping {used - lam:.4g} the system is {ritz.definiteness(used)}")
    shifts = [used] if abs(automatic - used) <= 0.01 * used else [used, automatic]
    rivals = {other: entry() for other, entry in SOLVERS if other != name}
    after_steps = [other for other in rivals if hasattr(rivals[other], "attach")]
    rivals = {other: rival for other, rival in rivals.items() if other not in after_steps}
    candidates = {name: solver} | rivals
    _observe_gradients(problem, candidates.values())
    rows, skipped = compare_solvers(candidates, operator, v, lam, shifts, effort.max_products)
    skipped |= dict.fromkeys(after_steps, "it depends on the steps of the lower optimizer")
    advice = advise(operator, v, name, solver, used, lam, ritz, rivals, effort.max_products)
    return {
        "real": {
            "curvature": problem.curvature_matrix,
            "parameters": len(v),
            "lambda": lam,
            "seconds_per_product": seconds,
            "symmetry": symmetry,
            "spectrum": {"values": ritz.values.tolist(), "bounds": ritz.bounds.tolist()},
            "damping": {"configured": solver.damping, "used": used - lam, "automatic": automatic - lam},
            "definiteness": [{"damping": s - lam, "state": ritz.definiteness(s)} for s in shifts],
            "tolerance": getattr(solver, "tolerance", None),
            "solvers": rows,
            "skipped": skipped,
        },
        "advice": {**dataclasses.asdict(advice), "overrides": _overrides(section, advice)},
    }


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


def _observe_gradients(problem: BiLevel, solvers: Iterable[Any]) -> None:
    """Give solvers that use the gradients of lower steps those of an alternation, all at the current weights."""
    observers = [solver for solver in solvers if hasattr(solver, "observe_lower_gradient")]
    lower, named = problem.lower, dict(problem.lower.backbone.named_parameters())
    variables = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    with frozen_state([lower.backbone, lower.head]):
        for _ in range(problem.lower_steps):
            total, _ = lower.loss(lower.backbone, lower.next_batch())
            grads = torch.autograd.grad(total, list(variables.values()), materialize_grads=True)
            for solver in observers:
                reduced = (all_reduce_mean(grad) for grad in grads)
                solver.observe_lower_gradient(dict(zip(variables, reduced, strict=True)))


def _overrides(section: DictConfig, advice: Advice) -> list[list[str]]:
    """Return the changes as command-line overrides, with the keys removed that another solver does not have."""
    overrides = []
    for change in advice.changes:
        words = [f"solver.{key}={value}" for key, value in change.items()]
        if "name" in change:
            entry, configured = SOLVERS.get(change["name"]), build_part(section)
            known = {field.name for field in dataclasses.fields(entry)}
            words += [f"~solver.{key}" for key in section if key not in {*known, "name", "_target_"}]
            if budget_key(configured) and budget_key(entry()) not in section:
                words.append(f"+solver.{budget_key(entry())}={getattr(configured, budget_key(configured))}")
        overrides.append(words)
    return overrides


# ------------------------------------------------------------------------------------------------ report


def save(result: dict[str, Any], folder: Path) -> None:
    """Write `check.json` and `check.png`."""
    write_atomically(folder / "check.json", json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    plot(result["real"]).savefig(folder / "check.png", dpi=120)


def _finite(value: Any) -> Any:
    """Replace infinity and NaN by strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(real: dict[str, Any]) -> str:
    """Return the residuals by solver, damping and budget of products."""
    budgets = max(([p["budget"] for p in row["points"]] for row in real["solvers"]), key=len)
    rows = []
    for row in real["solvers"]:
        cells = [f"{p['residual']:.1e}" for p in row["points"]]
        cells += [""] * (len(budgets) - len(cells))
        cosines = [f"{row[key]:.4f}" for key in ("cosine_to_v", "cosine_to_best")]
        rows.append([row["solver"], f"{row['damping']:.4g}", *cells, row["points"][-1]["status"], *cosines])
    headers = ["solver", "damping", f"budget {budgets[0]}", *budgets[1:], "last status", "cos(x, v)", "cos(x, best)"]
    skipped = [f"{name} skipped: {reason}" for name, reason in real["skipped"].items()]
    title = "true relative residual by budget of products (one value for solvers without a budget)"
    return "\n".join([title, tabulate(rows, headers=headers, disable_numparse=True), *skipped])


def plot(real: dict[str, Any]) -> Figure:
    """Plot the residual over the number of products, and the Ritz values of A."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
    _plot_residuals(left, real)
    _plot_spectrum(right, real)
    return figure


def _plot_residuals(axes: Axes, real: dict[str, Any]) -> None:
    names = list(dict.fromkeys(row["solver"] for row in real["solvers"]))
    first = real["solvers"][0]["damping"]
    for row in real["solvers"]:
        number = names.index(row["solver"])
        style = {"color": COLORS[number % len(COLORS)], "linestyle": "-" if row["damping"] == first else "--"}
        style["label"] = f"{row['solver']}, damping {row['damping']:.4g}"
        points = [p for p in row["points"] if math.isfinite(p["residual"])]
        if points and points[-1]["budget"] is None:
            axes.axhline(points[-1]["residual"], linewidth=1, **style)
        else:
            products, residuals = [p["products"] for p in points], [p["residual"] for p in points]
            axes.plot(products, residuals, marker=MARKERS[number % len(MARKERS)], markersize=5, **style)
    if real["tolerance"]:
        axes.axhline(real["tolerance"], color="0.5", linestyle=":", label=f"tolerance {real['tolerance']:g}")
    axes.set(yscale="log", xlabel="products reported by the solver", ylabel="relative residual ||v - Ax|| / ||v||")
    axes.set_title(f"Solvers from an empty subspace (P = {real['parameters']:,})")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plot_spectrum(axes: Axes, real: dict[str, Any]) -> None:
    for number, item in enumerate(real["definiteness"]):
        shift = real["lambda"] + item["damping"]
        values = [1 + value / shift for value in real["spectrum"]["values"]]
        errors = [bound / shift for bound in real["spectrum"]["bounds"]]
        label = f"damping {item['damping']:.4g}: {item['state']}"
        style = {"fmt": MARKERS[number], "color": COLORS[number], "markersize": 5, "capsize": 3}
        axes.errorbar(values, [number] * len(values), xerr=errors, label=label, **style)
    count = len(real["definiteness"])
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.margins(x=0.1)
    axes.set(xlabel="Ritz values of A = I + curvature / (lambda + damping), with error bounds", ylabel="damping")
    axes.set_yticks(range(count), [f"{item['damping']:.4g}" for item in real["definiteness"]])
    axes.set(ylim=(-0.5, count - 0.2), title="Spectrum: A is indefinite if a value is left of the line")
    axes.legend(fontsize=8, loc="upper left")
