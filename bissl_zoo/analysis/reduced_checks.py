"""The hypergradient of the reduced problem against finite differences and a direct solve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bissl_zoo.analysis.reduced_problem import ReducedProblem, place
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.distributed import all_reduce_mean, flatten
from bissl_zoo.hypergradient import Exact

#: relative error allowed: fourth-order differences in float64 leave about 1e-10, a wrong term 1e-3 and more
LIMIT = 1e-6


@dataclass(frozen=True)
class Check:
    """A figure of the reduced problem against an independent one; it passes up to `limit`."""

    name: str
    error: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit


def check_reduced(reduced: ReducedProblem, name: str, solver: Any) -> list[Check]:
    """Product, hypergradient and the configured solver against finite differences and a direct solve."""
    with torch.random.fork_rng():
        return [_product(reduced), _objective(reduced), *_solver(reduced, name, solver)]


def _product(reduced: ReducedProblem) -> Check:
    operator = reduced.operator(Exact(damping=0.0))
    theta = flatten(p.detach() for p in reduced.parameters)
    directions = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(0), dtype=theta.dtype)
    directions = nn.functional.normalize(directions)
    products = [operator.hessian_product(u) for u in directions]  # before the parameters move under their graph

    def gradient(at: Tensor) -> Tensor:
        place(reduced.parameters, at)
        return reduced.gradient()

    worst = (0.0, 1.0)
    for u, found in zip(directions, products, strict=True):
        expected = differences(gradient, theta, u)
        error = float((found - expected).norm() / expected.norm())
        worst = max(worst, (error, float(found @ expected / expected.square().sum())))
    place(reduced.parameters, theta)
    detail = f"on average {worst[1]:.4g} times what it should be" if worst[0] > LIMIT else "3 random directions"
    return Check("Hessian-vector product against finite differences of the gradient", worst[0], LIMIT, detail)


def _objective(reduced: ReducedProblem) -> Check:
    problem = reduced.problem
    v = right_hand_side(problem, reduced.batch)
    found = problem.upper_gradients(reduced.batch, reduced.operator(Exact(damping=0.0)))
    theta_d = flatten(p.detach() for p in problem.upper.backbone_parameters)
    hessian = reduced.hessian()
    slopes = [
        differences(lambda at: torch.tensor(reduced.objective(at, hessian), dtype=at.dtype), theta_d, unit)
        for unit in torch.eye(len(theta_d), dtype=theta_d.dtype)
    ]
    reduced.objective(theta_d, hessian)
    expected = torch.stack(slopes)
    error = float((found.backbone - expected).norm() / expected.norm())
    moved = float((found.solution.x - v).norm() / v.norm())
    detail = f"curvature moves it by {moved:.0%} from no curvature at all"
    return Check("exact hypergradient against finite differences of the objective", error, LIMIT, detail)


def _solver(reduced: ReducedProblem, name: str, solver: Any) -> list[Check]:
    problem, operator = reduced.problem, reduced.operator(solver)
    v = right_hand_side(problem, reduced.batch)
    solution = problem.upper_gradients(reduced.batch, operator).solution
    columns = [operator(unit) for unit in torch.eye(len(v), dtype=v.dtype)]
    matrix = torch.stack(columns, dim=1)
    expected = torch.linalg.solve(matrix, v)
    residual = float((v - matrix @ solution.x).norm() / v.norm())
    least = float(torch.linalg.svdvals(matrix)[-1])
    error = float((solution.x - expected).norm() / expected.norm())
    # ||x - A^-1 v|| <= ||v - A x|| / least singular value, and rounding
    limit = residual * float(v.norm() / expected.norm()) / least * (1 + LIMIT) + 1e-12
    detail = f"residual {residual:.2g}, {solution.status}; limit: residual / least singular value {least:.3g}"
    checks = [Check(f"{name} at damping {operator.shift - problem.lam:.4g} against exact", error, limit, detail)]
    if solution.residual is not None:
        difference = abs(solution.residual - residual) / max(residual, 1e-9)
        checks.append(Check(f"residual that {name} reports", difference, LIMIT, f"{solution.residual:.2g}"))
    return checks


def right_hand_side(problem: BiLevel, batch: Any) -> Tensor:
    """`v (P,)`, the gradient of the downstream loss at the lower backbone under the upper head."""
    lower, upper = problem.lower, problem.upper
    total, _ = upper.loss(lower.backbone, batch)
    return all_reduce_mean(flatten(torch.autograd.grad(total, lower.backbone_parameters, materialize_grads=True)))


def differences(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float = 2e-4) -> Tensor:
    """The derivative of `function` along `direction`, by central differences of fourth order."""
    near, far = (function(point + n * step * direction) - function(point - n * step * direction) for n in (1, 2))
    return (8 * near - far) / (12 * step)
