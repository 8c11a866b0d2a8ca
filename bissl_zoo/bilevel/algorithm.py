"""The BiSSL algorithm (arXiv 2410.02387, section 3): alternate lower steps and upper steps.

    min over theta_D, phi_D:  L_D(theta_P*(theta_D), phi_D) + gamma L_D(theta_D, phi_D)
    with  theta_P*(theta_D) = argmin over theta_P, phi_P of  L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2

By the implicit function theorem `d theta_P* / d theta_D = (I + H / lambda)^-1`, with `H` the Hessian of `L_P` in
`theta_P`; a solver adds damping to lambda. This file depends on levels and not on networks: a head has
`losses(backbone, batch)`, a level has parameters and an optimizer.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import first_samples
from bissl_zoo.distributed import (
    all_gather_objects,
    all_reduce_mean,
    any_rank,
    average_gradients,
    flatten,
    get_world_size,
    unflatten_like,
)
from bissl_zoo.errors import BadHypergradient, ConfigError
from bissl_zoo.hypergradient import (
    CurvatureOperator,
    GaussNewtonOperator,
    GraphOperator,
    LinearOperator,
    Solution,
    choose_shift,
    frozen_state,
)
from bissl_zoo.optim import effective_learning_rate

logger = logging.getLogger(__name__)

#: automatic Gauss-Newton damping before a lower step, or if the last one was undone
UNMEASURED_DAMPING = 1.0
#: limit of the relative residual and of `||x|| / ||v||` of a usable solution
FAR = 1e3


class UpperGradients(NamedTuple):
    """Gradients of the upper objective in one step, averaged over ranks.

    Attributes:
        backbone: `(P,)`, `x + gamma * grad L_D(theta_D, phi_D)` in theta.
        head: `(Q,)`, `grad L_D(theta_P, phi_D) + gamma * grad L_D(theta_D, phi_D)` in phi_D.
        solution: the solver's solution `x`.
        metrics: losses, norms and the cosine between `x` and the plain gradient.
    """

    backbone: Tensor
    head: Tensor
    solution: Solution
    metrics: dict[str, float]


@dataclass(frozen=True)
class Adaptation:
    """`theta_D <- (1 - alpha) theta_D + alpha theta_P` every `every` alternations (versions 1 and 2 of the paper)."""

    every: int = 100
    alpha: float = 0.1


class BiLevel:
    """Two levels and the alternation between them (arXiv 2410.02387, algorithm 1).

    Args:
        lower: pretext level, `theta_P` and `phi_P`; its backbone is the result of the stage.
        upper: downstream level, `theta_D` and `phi_D`.
        solver: maps `(operator, v)` to a `Solution`. It has `damping`; if that is "auto", also `iterations` and
            `tolerance`, for which the damping is chosen. It may also have `attach(optimizer, parameters)`, called
            with those of the lower backbone, `start_alternation(lower_steps)`, and `observe_lower_gradient(gradients)`,
            called with the gradient of `L_P` alone in each lower step, by name.
        lam: lambda, weight of the pull of `theta_P` towards `theta_D`.
        gamma: weight of the plain downstream loss; 0 disables it.
        lower_steps: N_L, lower steps per alternation.
        upper_steps: N_U, upper steps per alternation.
        alternations: T, number of alternations of the stage.
        adaptation: adaptation of `theta_D` in versions 1 and 2 of the paper, or None.
        curvature_batch_size: samples of the pretext batch that defines `H`, over all ranks; None for a whole batch.
        update_bn_stats: update the lower backbone's batch-norm statistics with the downstream images that give `v`.
        curvature: "gauss_newton", positive semidefinite, for lower heads that have `outputs` and `outer`; or "hessian",
            exact and in general indefinite.
        curvature_precision: "float32" or "tf32", of products on CUDA.
        hvp_mode: "retain_graph" or "recompute", see :class:`GraphOperator`.
        on_bad_hypergradient: if the solution is not finite or exceeds :data:`FAR`, "stop" raises an error and "plain"
            uses `v` in place of `x`.
    Raises:
        ConfigError: lambda is not positive, `curvature_batch_size` is smaller than the number of ranks, or the lower
            level contains a SyncBatchNorm.

    Attributes:
        shift: lambda plus the automatic damping of the last alternation, the start of the next; None before the first.
        time_constant: `1 / (lr_eff N_L)` of this alternation's lower steps, the curvature below which they do not
            converge; None before the first alternation, and if the last lower step was undone.
        fallbacks: number of upper steps that used `v` in place of `x`.
        diagnostics: metrics of each upper step of the last alternation; empty for a step that a level's guard undid.
    """

    def __init__(
        self,
        lower: Level,
        upper: Level,
        solver: Callable[[LinearOperator, Tensor], Solution],
        lam: float = 0.001,
        gamma: float = 1.0,
        lower_steps: int = 20,
        upper_steps: int = 8,
        alternations: int = 500,
        adaptation: Adaptation | None = None,
        curvature_batch_size: int | None = None,
        update_bn_stats: bool = True,
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        curvature_precision: Literal["float32", "tf32"] = "float32",
        hvp_mode: Literal["retain_graph", "recompute"] = "retain_graph",
        on_bad_hypergradient: Literal["stop", "plain"] = "stop",
    ) -> None:
        if not lam > 0:
            raise ConfigError(f"bilevel.lambda is {lam}; it must be positive, since it couples the two levels.")
        if curvature_batch_size is not None and curvature_batch_size < get_world_size():
            raise ConfigError(
                f"bilevel.curvature_batch_size is {curvature_batch_size}; each of the {get_world_size()} ranks needs a "
                "sample."
            )
        refuse_sync_batch_norm(lower.backbone, lower.head)
        if hasattr(solver, "attach"):
            solver.attach(lower.optimizer, lower.backbone_parameters)
        self.lower, self.upper, self.solver = lower, upper, solver
        self.lam, self.gamma = lam, gamma
        self.lower_steps, self.upper_steps, self.alternations = lower_steps, upper_steps, alternations
        self.adaptation = adaptation
        self.curvature_batch_size = curvature_batch_size
        self.update_bn_stats = update_bn_stats
        if curvature == "gauss_newton" and not hasattr(lower.head, "outer"):
            logger.info(
                f"{type(lower.head).__name__} has no outputs and outer, so the curvature is the Hessian of its loss."
            )
            curvature = "hessian"
        self.curvature_matrix, self.curvature_precision = curvature, curvature_precision
        self.hvp_mode = hvp_mode
        self.on_bad_hypergradient = on_bad_hypergradient
        self.shift: float | None = None
        self.time_constant: float | None = None
        self._rate: Tensor | float = 0.0
        self.fallbacks = 0
        self.curvature_batch: Any = None
        self.diagnostics: list[dict[str, Any]] = []

    def alternate(self, alternation: int) -> dict[str, float]:
        """Run alternation number `alternation` (from 0); return the metrics of its last lower and last upper step."""
        metrics = self.lower_phase()
        operator = self.curvature(self.lower.next_batch()).prepare()
        try:
            self.diagnostics = [self.upper.attempt(lambda: self.upper_step(operator)) for _ in range(self.upper_steps)]
        finally:
            operator.release()
            self.curvature_batch = None
        for step in self.diagnostics:
            metrics.update(step)
        adapts = self.adaptation and (alternation + 1) % self.adaptation.every == 0
        if adapts and alternation + 1 < self.alternations:
            self.adapt(self.adaptation.alpha)
        return metrics

    def lower_phase(self) -> dict[str, float]:
        """Take the lower steps of an alternation and measure `time_constant`; return the metrics of the last step."""
        metrics: dict[str, float] = {}
        if hasattr(self.solver, "start_alternation"):
            self.solver.start_alternation(self.lower_steps)
        self._rate = 0.0
        for step in range(1, self.lower_steps + 1):
            last = step == self.lower_steps
            metrics.update(self.lower.attempt(functools.partial(self.lower_step, last)))
        # N_L steps follow theta_D in directions of larger curvature than this; in the others they stop early, which
        # acts as Tikhonov damping of this size
        rate = float(self._rate) * self.lower_steps
        self.time_constant = 1.0 / rate if 0 < rate < math.inf else None
        return metrics

    def lower_step(self, measure: bool = False) -> dict[str, float]:
        """Take one step on `L_P + lambda/2 ||theta_P - theta_D||^2` in `(theta_P, phi_P)`; return its metrics."""
        lower = self.lower
        total, losses = lower.loss(lower.backbone, lower.next_batch())
        total.backward()
        average_gradients(lower.parameters)
        for theta_p in lower.backbone_parameters:  # unused ones are pulled as well
            theta_p.grad = torch.zeros_like(theta_p) if theta_p.grad is None else theta_p.grad
        if hasattr(self.solver, "observe_lower_gradient"):
            named = lower.backbone.named_parameters()
            self.solver.observe_lower_gradient({name: p.grad for name, p in named if p.requires_grad})
        pull = []
        for theta_p, theta_d in zip(lower.backbone_parameters, self.upper.backbone_parameters, strict=True):
            gap = theta_p.detach() - theta_d.detach()
            theta_p.grad.add_(gap, alpha=self.lam)
            pull.append(gap.square().sum())
        if measure:
            before = flatten(lower.backbone_parameters).detach()
            gradient = flatten([theta_p.grad for theta_p in lower.backbone_parameters])
        metrics = lower.optimize(losses, pull=torch.stack(pull).sum() * (self.lam / 2))
        if measure:
            self._rate = self._effective_rate(before, gradient)
        if hasattr(lower.head, "after_step"):
            lower.head.after_step(lower.backbone)
        return {f"lower/{name}": value for name, value in metrics.items()}

    def _effective_rate(self, before: Tensor, gradient: Tensor) -> Tensor | float:
        """Return the rate of a lower step from the parameters before it and its gradient, both `(P,)`.

        It is `lr / (1 - momentum)` for SGD, and for other optimizers the length of the step over its gradient's norm.
        """
        lower = self.lower
        if isinstance(lower.optimizer, torch.optim.SGD):
            return effective_learning_rate(lower.optimizer, scheduled=True)
        moved = (flatten(lower.backbone_parameters).detach() - before).norm()
        return moved / gradient.norm().clamp(min=torch.finfo(gradient.dtype).tiny)

    def curvature(self, batch: Any) -> GraphOperator:
        """Return the operator `I + M / (lambda + damping)` at the current `theta_P` and `phi_P` for a pretext batch.

        `M` is the Gauss-Newton matrix or the Hessian of the lower loss. Automatic damping of the first is the lower
        level's time constant. That of the second is at least as large, depends on the spectrum and needs a right-hand
        side, so the first upper step chooses it. A loss that is not finite is detected in the solution.
        """
        lower = self.lower
        if self.curvature_batch_size is not None:
            batch = first_samples(batch, self.curvature_batch_size // get_world_size())
        self.curvature_batch = batch  # for messages
        options = {
            "parameters": lower.backbone_parameters,
            "modules": (lower.backbone, lower.head),
            "reduce": all_reduce_mean,
            "hvp_mode": self.hvp_mode,
            "precision": self.curvature_precision,
        }
        damping = self.solver.damping
        if self.curvature_matrix == "gauss_newton":
            if damping == "auto":
                damping = self.time_constant or UNMEASURED_DAMPING
                if self.time_constant is None:
                    logger.warning(f"No lower step was measured in this alternation: damping is {UNMEASURED_DAMPING}.")
            return GaussNewtonOperator(
                outputs=lambda: lower.head.outputs(lower.backbone, batch),
                outer=lambda outputs: torch.stack(list(lower.head.outer(outputs).values())).sum(),
                shift=self.lam + damping,
                **options,
            )

        shift = None if damping == "auto" else self.lam + damping
        return CurvatureOperator(lambda: lower.loss(lower.backbone, batch, amp=False)[0], shift=shift, **options)

    def upper_step(self, operator: LinearOperator) -> dict[str, float]:
        """Take one step on `(theta_D, phi_D)` along the hypergradient; return its metrics."""
        upper = self.upper
        gradients = self.upper_gradients(upper.next_batch(), operator)
        for parameters, flat in (
            (upper.backbone_parameters, gradients.backbone),
            (upper.head_parameters, gradients.head),
        ):
            for parameter, grad in zip(parameters, unflatten_like(flat, parameters), strict=True):
                parameter.grad = grad.clone()
        step = upper.optimize()
        return {**gradients.metrics, **{f"upper/{name}": value for name, value in step.items()}}

    def upper_gradients(self, batch: Any, operator: LinearOperator) -> UpperGradients:
        """Return the gradients of the upper objective on one downstream batch (arXiv 2410.02387, section 3.2).

        Args:
            batch: a batch of the task's data loader.
            operator: damped curvature of this alternation on flat `(P,)` vectors.
        Raises:
            NonFiniteLoss: a loss or the gradient `v` is not finite.
            BadHypergradient: the solution is not usable and `on_bad_hypergradient` is "stop".
        """
        lower, upper = self.lower, self.upper
        with contextlib.nullcontext() if self.update_bn_stats else frozen_state([lower.backbone]):
            v, head, losses = self._downstream_gradients(lower.backbone, batch)
        checked = upper.checked(losses, v.norm())
        v_norm = checked.pop("grad_norm")
        products = self._choose_damping(operator, v) if operator.automatic else 0
        solution, x_norm = self._solve(operator, v, v_norm)
        backbone = solution.x
        metrics = {
            **{f"upper/{name}": value for name, value in checked.items()},
            "solver/products": products + solution.products,
            "solver/status": solution.status,
            "solver/damping": operator.shift - self.lam,
            "solver/damping_over_lambda": (operator.shift - self.lam) / self.lam,
            "solver/v_norm": v_norm,
            "solver/x_norm": x_norm,
            "solver/norm_ratio": x_norm / v_norm if v_norm else 1.0,
            "solver/cos_xv": float(nn.functional.cosine_similarity(solution.x, v, dim=0)),
            "solver/fallbacks": self.fallbacks,
        }
        if self.time_constant is not None:
            metrics["solver/damping_over_time_constant"] = (operator.shift - self.lam) / self.time_constant
        if solution.residual is not None:
            metrics["solver/residual"] = solution.residual
        if operator.subspace.explored:
            metrics["solver/least_ritz_value"] = 1.0 + float(operator.subspace.ritz_values()[0][0]) / operator.shift
            metrics["solver/negative_share"] = operator.subspace.negative_share(solution.x)
        if self.gamma:
            plain, plain_head, losses = self._downstream_gradients(upper.backbone, batch)
            backbone = backbone + self.gamma * plain
            head = head + self.gamma * plain_head
            checked = upper.checked(losses, plain.norm())
            metrics["solver/plain_norm"] = checked.pop("grad_norm")
            metrics.update({f"upper/plain_{name}": checked[name] for name in losses})
            metrics["solver/cos_x_plain"] = float(nn.functional.cosine_similarity(solution.x, plain, dim=0))
        return UpperGradients(backbone, head, solution, metrics)

    def _solve(self, operator: LinearOperator, v: Tensor, v_norm: float) -> tuple[Solution, float]:
        """Return the solution, or `v` in place of a bad one, and its norm."""
        solution = self.solver(operator, v)
        x_norm = float(solution.x.norm())
        solves = (solution.residual or 0.0) <= FAR or torch.equal(solution.x, v)  # x = v is safe with any residual
        bad = solution.status == "non_finite" or not (solves and x_norm <= FAR * v_norm)
        if not any_rank(bad, v.device):
            self.shift = operator.shift if operator.automatic else None  # the solver may have raised it
            return solution, x_norm
        if self.on_bad_hypergradient == "stop":
            losses = all_gather_objects(self._curvature_losses())
            raise BadHypergradient(
                f"{self.upper.name} level, step {self.upper.step}: {type(self.solver).__name__} returned no usable "
                f"hypergradient: status {solution.status}, residual {solution.residual}, |x| {x_norm:.3g}, |v| "
                f"{v_norm:.3g}, losses of the pretext batch on each rank {losses}. "
                "Raise solver.damping or set it to auto, or set bilevel.on_bad_hypergradient=plain to use v instead."
            )
        self.fallbacks += 1
        return replace(solution, x=v), v_norm

    def _curvature_losses(self) -> dict[str, float]:
        lower = self.lower
        with torch.no_grad(), frozen_state([lower.backbone, lower.head]):
            _, losses = lower.loss(lower.backbone, self.curvature_batch, amp=False)
        return {name: float(loss) for name, loss in losses.items()}

    def _choose_damping(self, operator: LinearOperator, v: Tensor) -> int:
        """Set the operator's shift; return the products spent, which the solve reuses from the subspace.

        It is at least the time constant, and rises at once if the solver needs more. From one alternation to the next
        it falls at most to the geometric mean of the two.
        """
        if operator.shift is not None:
            return 0
        at_least = self.lam + (self.time_constant or 0.0)
        needed, products = choose_shift(operator, v, self.solver.iterations, self.solver.tolerance, at_least)
        operator.shift = needed if self.shift is None else max(needed, (needed * self.shift) ** 0.5)
        return products

    def _downstream_gradients(self, backbone: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, losses = self.upper.loss(backbone, batch)
        shared, head = [p for p in backbone.parameters() if p.requires_grad], self.upper.head_parameters
        grads = torch.autograd.grad(total, [*shared, *head], materialize_grads=True)
        flat = all_reduce_mean(flatten(grads))
        sizes = [sum(p.numel() for p in parameters) for parameters in (shared, head)]
        return (*flat.split(sizes), losses)

    @torch.no_grad()
    def adapt(self, alpha: float) -> None:
        """Move parameters and buffers of `theta_D` by `alpha` towards `theta_P`; the optimizers keep their state."""
        lower = self.lower.backbone.state_dict(keep_vars=True)
        for name, tensor in self.upper.backbone.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.lerp_(lower[name], alpha)


def refuse_sync_batch_norm(*modules: nn.Module) -> None:
    """Raise `ConfigError` if a module of the lower level is a SyncBatchNorm, which has no second derivative."""
    for module in modules:
        for name, child in module.named_modules():
            if isinstance(child, nn.SyncBatchNorm):
                raise ConfigError(
                    f"The lower level contains a SyncBatchNorm ('{name}'), which has no second derivative "
                    "(pytorch/pytorch#61222). Use plain batch norm: each rank normalizes its part of the batch."
                )
