"""The BiSSL algorithm (arXiv 2410.02387, section 3): lower steps, one curvature operator, upper steps, and again.

This file knows levels, not networks: a head has `losses(backbone, batch)`, a level has parameters and an optimizer.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bissl_zoo.data.batches import first_samples
from bissl_zoo.distributed import (
    all_gather_objects,
    all_reduce_mean,
    average_gradients,
    flatten,
    get_world_size,
    unflatten_like,
)
from bissl_zoo.errors import ConfigError, NonFiniteLoss
from bissl_zoo.hypergradient import SOLVERS, CurvatureOperator, LinearOperator, Solution, frozen_state
from bissl_zoo.optim import LRMultiplier, clip_gradients, set_learning_rate
from bissl_zoo.registry import HYPERGRADIENT_SOLVERS

for _name, _solver in SOLVERS.items():
    HYPERGRADIENT_SOLVERS.register(_name)(_solver)


@dataclass
class Level:
    """One of the two levels: a backbone, a head on it, and how they are trained.

    Attributes:
        name: `lower` or `upper` (or the stage's name where there is one level only), for messages and metrics.
        batches: endless iterator of batches, as `head.losses` takes them; a generator where a trainer is to close it.
        multiplier: factor on the learning rate; total_steps: the length of its schedule in optimizer steps.
        clip_norm: limit of the global gradient norm; None for none.
        step: optimizer steps taken.
    """

    name: str
    backbone: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Any]
    multiplier: LRMultiplier
    total_steps: int
    clip_norm: float | None = 10.0
    step: int = 0

    @property
    def backbone_parameters(self) -> list[Tensor]:
        """What the levels share, in the order of a flat vector."""
        return list(self.backbone.parameters())

    @property
    def head_parameters(self) -> list[Tensor]:
        """The head's parameters that are trained."""
        return [p for p in self.head.parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[Tensor]:
        """All that this level's optimizer trains."""
        return [p for p in self.backbone.parameters() if p.requires_grad] + self.head_parameters

    def loss(self, backbone: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The summed loss of this level's head on `backbone`, with its graph, and the terms by name as numbers.

        Raises:
            NonFiniteLoss: on any rank, with the level, the step and the losses by name.
        """
        losses = self.head.losses(backbone, batch)
        total = torch.stack(list(losses.values())).sum()
        values = dict(zip(losses, torch.stack([loss.detach() for loss in losses.values()]).tolist(), strict=True))
        terms = None
        if not all(math.isfinite(value) for value in values.values()):
            terms = ", ".join(f"{name}={value:g}" for name, value in values.items())
        for rank, found in enumerate(all_gather_objects(terms)):
            if found is not None:
                raise NonFiniteLoss(
                    f"{self.name} level, step {self.step}, rank {rank}: the loss is not finite ({found}). "
                    "Lower the learning rate, lengthen the warm-up, or look at the inputs of this step."
                )
        return total, values

    def optimize(self) -> dict[str, float]:
        """Clip the gradients that are there, set this step's learning rate, and take the step.

        Raises:
            NonFiniteLoss: a gradient is not finite; the parameters are still those of before the step.
        """
        norm = clip_gradients(self.parameters, self.clip_norm)
        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"{self.name} level, step {self.step}: the loss is finite but the norm of its gradient is {norm}. "
                "Lower the learning rate, lengthen the warm-up, or look at the inputs of this step."
            )
        lr = set_learning_rate(self.optimizer, self.multiplier(self.step, self.total_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"lr": lr, "grad_norm": norm}


class UpperGradients(NamedTuple):
    """What one upper step follows, averaged over ranks.

    Attributes:
        backbone: `(P,)`, the curvature term plus gamma times the plain one.
        head: `(Q,)`, likewise.
        solution: the solver's answer for the curvature term.
        metrics: losses, norms and the cosine between the two terms.
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
    """The two levels and the alternation between them.

    Args:
        lower: pretext level, `theta_P` and `phi_P`; its backbone is what leaves the stage.
        upper: downstream level, `theta_D` and `phi_D`.
        solver: takes `(operator, v)`, returns a `Solution`; has `damping`.
        lam: lambda, strength of the pull of `theta_P` towards `theta_D`.
        gamma: weight of the plain downstream loss; 0 leaves it out.
        lower_steps, upper_steps: per alternation.
        alternations: T, of the whole stage.
        adaptation: of versions 1 and 2 of the paper, or None.
        curvature_batch_size: samples of the pretext batch that defines `H`, over all ranks; None for a whole batch.
        move_statistics: whether the downstream images that give `v` move the lower backbone's batch-norm statistics.
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
        move_statistics: bool = True,
    ) -> None:
        if not lam > 0:
            raise ConfigError(f"bilevel.lambda is {lam}; it must be positive, or nothing ties the two levels.")
        if curvature_batch_size is not None and curvature_batch_size < get_world_size():
            raise ConfigError(
                f"bilevel.curvature_batch_size is {curvature_batch_size}; each rank needs a sample of it."
            )
        refuse_sync_batch_norm(lower.backbone, lower.head)
        self.lower, self.upper, self.solver = lower, upper, solver
        self.lam, self.gamma = lam, gamma
        self.lower_steps, self.upper_steps, self.alternations = lower_steps, upper_steps, alternations
        self.adaptation = adaptation
        self.curvature_batch_size = curvature_batch_size
        self.move_statistics = move_statistics

    def alternate(self, alternation: int) -> dict[str, float]:
        """Alternation number `alternation`, from 0; returns the metrics of its last lower and its last upper step."""
        metrics: dict[str, float] = {}
        for _ in range(self.lower_steps):
            metrics.update(self.lower_step())
        operator = self.curvature(next(self.lower.batches)).prepare()
        try:
            for _ in range(self.upper_steps):
                metrics.update(self.upper_step(operator))
        finally:
            operator.release()
        adapts = self.adaptation and (alternation + 1) % self.adaptation.every == 0
        if adapts and alternation + 1 < self.alternations:
            self.adapt(self.adaptation.alpha)
        return metrics

    def lower_step(self) -> dict[str, float]:
        """One step on `L_P + lambda/2 ||theta_P - theta_D||^2` with `theta_D` held constant."""
        lower = self.lower
        total, losses = lower.loss(lower.backbone, next(lower.batches))
        total.backward()
        average_gradients(lower.parameters)
        pull = 0.0
        for theta_p, theta_d in zip(lower.backbone_parameters, self.upper.backbone_parameters, strict=True):
            gap = theta_p.detach() - theta_d.detach()
            theta_p.grad = gap * self.lam if theta_p.grad is None else theta_p.grad.add_(gap, alpha=self.lam)
            pull = pull + gap.square().sum()
        step = lower.optimize()
        lower.head.after_step(lower.backbone)
        return {
            "lower/total_loss": sum(losses.values()),
            **{f"lower/{name}": loss for name, loss in losses.items()},
            "lower/pull": float(pull) * self.lam / 2,
            **{f"lower/{name}": value for name, value in step.items()},
        }

    def curvature(self, batch: Any) -> CurvatureOperator:
        """`I + H / (lambda + damping)` at the present `theta_P` and `phi_P` for one pretext batch."""
        lower = self.lower
        if self.curvature_batch_size is not None:
            batch = first_samples(batch, self.curvature_batch_size // get_world_size())
        return CurvatureOperator(
            loss=lambda: lower.loss(lower.backbone, batch)[0],
            parameters=lower.backbone_parameters,
            strength=self.lam + self.solver.damping,
            modules=(lower.backbone, lower.head),
            reduce=all_reduce_mean,
        )

    def upper_step(self, operator: LinearOperator) -> dict[str, float]:
        """One step on `(theta_D, phi_D)` along the hypergradient."""
        upper = self.upper
        gradients = self.upper_gradients(next(upper.batches), operator)
        for parameters, flat in (
            (upper.backbone_parameters, gradients.backbone),
            (upper.head_parameters, gradients.head),
        ):
            for parameter, grad in zip(parameters, unflatten_like(flat, parameters), strict=True):
                parameter.grad = grad.clone()
        step = upper.optimize()
        return {**gradients.metrics, **{f"upper/{name}": value for name, value in step.items()}}

    def upper_gradients(self, batch: Any, operator: LinearOperator) -> UpperGradients:
        """The hypergradient of the upper objective on one downstream batch (arXiv 2410.02387, section 3.2).

        Args:
            batch: as the task's loader yields it.
            operator: the damped curvature of this alternation; takes and returns flat `(P,)` vectors.
        Raises:
            NonFiniteLoss: from either pass.
        """
        lower, upper = self.lower, self.upper
        with contextlib.nullcontext() if self.move_statistics else frozen_state([lower.backbone]):
            v, head, losses = self._downstream_gradients(lower.backbone, batch)
        solution = self.solver(operator, v)
        backbone = solution.x
        metrics = {
            "upper/total_loss": sum(losses.values()),
            **{f"upper/{name}": loss for name, loss in losses.items()},
            "solver/products": solution.products,
            "solver/status": solution.status,
            "solver/v_norm": float(v.norm()),
            "solver/x_norm": float(solution.x.norm()),
        }
        if solution.residual is not None:
            metrics["solver/residual"] = solution.residual
        if self.gamma:
            plain, plain_head, losses = self._downstream_gradients(upper.backbone, batch)
            backbone = backbone + self.gamma * plain
            head = head + self.gamma * plain_head
            metrics.update({f"upper/plain_{name}": loss for name, loss in losses.items()})
            metrics["solver/cosine"] = float(nn.functional.cosine_similarity(solution.x, plain, dim=0))
        return UpperGradients(backbone, head, solution, metrics)

    def _downstream_gradients(self, backbone: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
        total, losses = self.upper.loss(backbone, batch)
        shared, head = list(backbone.parameters()), self.upper.head_parameters
        grads = torch.autograd.grad(total, [*shared, *head], materialize_grads=True)
        flat = all_reduce_mean(flatten(grads))
        sizes = [sum(p.numel() for p in parameters) for parameters in (shared, head)]
        return (*flat.split(sizes), losses)

    @torch.no_grad()
    def adapt(self, alpha: float) -> None:
        """Move `theta_D`, parameters and buffers, by `alpha` towards `theta_P`; the optimizers keep their state."""
        lower = self.lower.backbone.state_dict(keep_vars=True)
        for name, tensor in self.upper.backbone.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.lerp_(lower[name], alpha)


def refuse_sync_batch_norm(*modules: nn.Module) -> None:
    """Raise `ConfigError` where a module of the lower level is a SyncBatchNorm, which has no second derivative."""
    for module in modules:
        for name, child in module.named_modules():
            if isinstance(child, nn.SyncBatchNorm):
                raise ConfigError(
                    f"The lower level holds a SyncBatchNorm ('{name}'), which cannot be differentiated twice "
                    "(pytorch/pytorch#61222). Use plain batch norm: each rank normalises its own part of the batch."
                )
