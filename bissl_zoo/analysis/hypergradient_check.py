"""Check the hypergradient of a config on a reduced problem, and its solver on the config's own networks and data."""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor

from bissl_zoo.analysis.reduced_problem import ReducedProblem, check_reduced, right_hand_side
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.distributed import all_reduce_mean
from bissl_zoo.engine.build import Context, Weights, build_part
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.hooks import Progress
from bissl_zoo.engine.init import adopt_pixels, load_init
from bissl_zoo.engine.stages import Bissl, HeadWarmup
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.files import write_atomically
from bissl_zoo.hypergradient import GraphOperator, frozen_state
from bissl_zoo.hypergradient.damping import choose_shift, lanczos
from bissl_zoo.hypergradient.solver import LinearOperator, Solution, power_of_two
from bissl_zoo.optim import effective_learning_rate
from bissl_zoo.registry import SOLVERS

logger = logging.getLogger(__name__)

#: relative residual of a solved system, for solvers without a tolerance
TOLERANCE = 0.05
Solver = Callable[[LinearOperator, Tensor], Solution]


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
    shifts = [used] if abs(automatic - used) <= 0.01 * used else [used, automatic]
    candidates = {name: solver} | {other: entry() for other, entry in SOLVERS if other != name}
    after_steps = [other for other in candidates if other != name and hasattr(candidates[other], "attach")]
    candidates = {other: candidate for other, candidate in candidates.items() if other not in after_steps}
    _observe_gradients(problem, candidates.values())
    rows, skipped = compare_solvers(candidates, operator, v, lam, shifts, effort.max_products)
    skipped |= dict.fromkeys(after_steps, "it depends on the steps of the lower optimizer")
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
            "solvers": rows,
            "skipped": skipped,
        },
        "advice": advise(operator, v, name, solver, used, lam, ritz, rows),
    }


def _check_symmetry(operator: LinearOperator, v: Tensor) -> tuple[dict[str, Any], float]:
    """Return `|u'Hw - w'Hu| / (|u| |Hw|)` for random vectors with its limit, and the seconds of a product."""
    u, w, first = torch.randn(3, len(v), generator=torch.Generator().manual_seed(0), dtype=v.dtype).to(v.device)
    operator.hessian_product(first)  # it may take longer
    start = time.perf_counter()
    error = symmetry_error(operator, u, w)
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


def symmetry_error(operator: LinearOperator, u: Tensor, w: Tensor) -> float:
    """Return `|u'Hw - w'Hu| / (|u| |Hw|)`; about `1 / sqrt(P)` for random vectors (P,) and an asymmetric matrix."""
    hu, hw = (operator.hessian_product(vector).double() for vector in (u, w))
    u, w = u.double(), w.double()
    size = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(hw)
    return float((u @ hw - w @ hu).abs() / size) if size > 0 else 0.0


# ------------------------------------------------------------------------------------------------ spectrum


class Spectrum(NamedTuple):
    """Ritz values of `H`, ascending (k,) float64, with the distance to the nearest eigenvalue as an upper bound."""

    values: Tensor
    bounds: Tensor

    def definiteness(self, shift: float) -> Literal["definite", "indefinite", "undecided"]:
        """Classify `I + H / shift`: "indefinite" is certain, "definite" as far as the values and bounds show."""
        if 1.0 + float(self.values[0]) / shift <= 0:
            return "indefinite"
        return "definite" if 1.0 + float((self.values - self.bounds).min()) / shift > 0 else "undecided"


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
    limit = getattr(solver, "iterations", 0) or 5
    shift, _ = choose_shift(operator, v, limit, getattr(solver, "tolerance", 0) or TOLERANCE, lam)
    operator.subspace.clear()
    return shift


# ------------------------------------------------------------------------------------------------ solvers


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


def solve(operator: CachedOperator, v: Tensor, solver: Solver, budget: int | None) -> tuple[dict[str, Any], Tensor]:
    """Solve from an empty subspace; return budget, products, the true residual and status, and the solution.

    The residual `||v - A x|| / ||v||` is measured with a product that is not cached.
    """
    operator.subspace.clear()
    solution = solver(operator, v)
    operator.subspace.clear()
    product = solution.x + operator.operator.hessian_product(solution.x) / operator.shift
    residual, size = (torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in (v - product, v))
    point = {"budget": budget, "products": solution.products, "residual": float(residual / size)}
    return {**point, "status": solution.status}, solution.x


def convergence(
    operator: CachedOperator, v: Tensor, solver: Solver, budgets: list[int]
) -> tuple[list[dict[str, Any]], Tensor]:
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
            rows.append(({"solver": other, "damping": shift - lam, "points": points}, x))
    for row, x in rows:
        same = [(r, y) for r, y in rows if r["damping"] == row["damping"]]
        _, best = min(same, key=lambda pair: pair[0]["points"][-1]["residual"])
        for key, y in (("cosine_to_v", v), ("cosine_to_best", best)):
            row[key] = float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=0))
    return [row for row, _ in rows], skipped


def advise(
    operator: LinearOperator,
    v: Tensor,
    name: str,
    solver: Solver,
    shift: float,
    lam: float,
    ritz: Spectrum,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return whether the configured solver solves the system at `shift`, and otherwise which solvers of the table do.

    Returns:
        `converges`, a `sentence`, and `options`: solver, damping and the smallest sufficient budget.
    """
    tolerance, state = getattr(solver, "tolerance", 0) or TOLERANCE, ritz.definiteness(shift)
    words = {"definite": "positive definite", "undecided": "not known to be definite"}.get(state, state)
    system = f"At damping {shift - lam:.4g} the system is {words}"
    options = []
    for row in rows:
        sufficient = [point["budget"] for point in row["points"] if point["residual"] <= tolerance]
        options += [{"solver": row["solver"], "damping": row["damping"], "budget": n} for n in sufficient[:1]]
    if is_too_large(solver, len(v)):
        converges, result = False, f"{name} does not accept {len(v)} parameters (max_size={solver.max_size})"
    else:
        point, _ = solve(CachedOperator(operator, shift), v, solver, None)
        converges = point["residual"] <= tolerance
        result = (
            f"{name} {'converges' if converges else 'does not converge within its limit'}: residual "
            f"{point['residual']:.2g} after {point['products']} products ({point['status']}), tolerance {tolerance:g}"
        )
    if converges:
        note = " But the lower level is not at a minimum; raise the damping." if state == "indefinite" else ""
        return {"converges": True, "sentence": f"{system}, and {result}.{note}", "options": options}
    texts = [
        f"{option['solver']} at damping {option['damping']:.4g}"
        + (f" with a budget of {option['budget']}" if option["budget"] else "")
        for option in options
    ]
    todo = f"These converge: {', '.join(texts)}" if texts else "No solver of the table converges; raise the damping"
    return {"converges": False, "sentence": f"{system}, and {result}. {todo}.", "options": options}


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
