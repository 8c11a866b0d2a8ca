"""SAMA: implicit gradient with an identity base Jacobian, corrected for the optimizer of the lower level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from bissl_zoo.hypergradient.solver import LinearOperator, Solution


@dataclass(eq=False)
class Sama:
    """Return `x = (du/dg)^T v`, scaled to `||x|| = ||v||` (SAMA; Choe et al., arXiv 2310.05674, section 3).

    `u` is the step that the lower optimizer makes with a gradient `g`, differentiated at the last lower step. The paper
    replaces the Jacobian of `u` in the weights by the identity, which leaves the scale open; with this one, SGD gives
    `x = v`. The lower optimizer is SGD, Adam, AdamW, or timm's Lars.

    Args:
        damping: of the operator; it has no effect.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._parameters: list[Tensor] = []
        self._last: list[tuple[Tensor, Tensor]] = []  # gradient and weight of each parameter in the last step

    def attach(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Follow the steps of the lower optimizer.

        Args:
            parameters: the backbone's, in the order of a flat `(P,)` vector.
        Raises:
            ValueError: SAMA has no derivative of this optimizer.
        """
        kind = type(optimizer).__name__
        options = [key for group in optimizer.param_groups for key in ("amsgrad", "trust_clip") if group.get(key)]
        if options or not (isinstance(optimizer, (SGD, Adam)) or kind == "Lars"):
            given = f"{kind} with {options[0]}" if options else kind
            raise ValueError(f"solver 'sama' has no derivative of {given}; it knows SGD, Adam, AdamW and Lars.")
        self._optimizer, self._parameters = optimizer, list(parameters)
        optimizer.register_step_pre_hook(self._remember)

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Return `x` for `v (P,)`, which is `v` before the first lower step; no product, no residual."""
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), None, 0, "non_finite")
        if not self._last:
            return Solution(v, None, 0, "not_solved")
        groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        parts = v.split([p.numel() for p in self._parameters])
        x = torch.cat(
            [
                self._transposed(p, groups[id(p)], gradient, weight, part.view_as(p)).reshape(-1)
                for p, (gradient, weight), part in zip(self._parameters, self._last, parts, strict=True)
            ]
        )
        norm = x.norm()
        if not torch.isfinite(norm):
            return Solution(v, None, 0, "non_finite")
        return Solution(x * (v.norm() / norm) if norm > 0 else v, None, 0, "not_solved")

    def _remember(self, *_: Any) -> None:
        """Copy gradients and weights before an optimizer step."""
        with torch.no_grad():
            self._last = [(p.grad.clone(), p.detach().clone()) for p in self._parameters]

    def _transposed(self, p: Tensor, group: dict[str, Any], g: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Return `(du/dg)^T v` of one parameter."""
        if isinstance(self._optimizer, SGD):
            return group["lr"] * v
        if isinstance(self._optimizer, Adam):
            return group["lr"] * _adam(self._optimizer.state[p], group, g, weight) * v
        return group["lr"] * _lars(group, g, weight, v)


def _adam(state: dict[str, Tensor], group: dict[str, Any], g: Tensor, weight: Tensor) -> Tensor:
    """Return the diagonal of the derivative of `m / (sqrt(s) + eps)`, with both moments as they are after the step."""
    (beta1, beta2), eps, t = group["betas"], group["eps"], float(state["step"])
    if not group["decoupled_weight_decay"]:
        g = g + group["weight_decay"] * weight
    m, s = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
    dm, ds = (1 - beta1) / (1 - beta1**t), 2 * (1 - beta2) / (1 - beta2**t) * g
    root = s.sqrt()
    # where the root is zero, so are g and m
    return dm / (root + eps) - m * ds / (2 * root.clamp(min=torch.finfo(s.dtype).tiny) * (root + eps).square())


def _lars(group: dict[str, Any], g: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """Return `v` times the derivative of `r (g + d w)` with the ratio `r = c |w| / (|g| + d |w| + eps)`."""
    decay, g_norm, w_norm = group["weight_decay"], g.norm(), weight.norm()
    adapts = (decay or group["always_adapt"]) and bool(g_norm > 0) and bool(w_norm > 0)
    if not adapts:
        return v
    total = g_norm + decay * w_norm + group["eps"]
    ratio = group["trust_coeff"] * w_norm / total
    return ratio * (v - g * ((g + decay * weight) * v).sum() / (g_norm * total))
