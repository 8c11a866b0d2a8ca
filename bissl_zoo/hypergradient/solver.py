"""What every hypergradient solver takes and returns."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LinearOperator(Protocol):
    """A symmetric matrix known by its products; `block_sizes` are the lengths of the parameter tensors in a vector."""

    block_sizes: list[int]

    def __call__(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Solution:
    """An approximate solution of `A x = v`.

    Attributes:
        x: flat `(P,)`, finite whatever happened.
        residual: `||v - A x|| / ||v||`, recomputed from `x`; None where the solver spends no product on it.
        products: how many times `A` was applied, the one for the residual included.
        status: `converged`, `max_iterations`, `negative_curvature`, `diverged`, `non_finite`, `singular`, or
            `not_solved` from solvers that solve nothing.
    """

    x: Tensor
    residual: float | None
    products: int
    status: str


def relative_residual(operator: LinearOperator, x: Tensor, v: Tensor) -> float:
    """`||v - A x|| / ||v||` at the price of one product; 0 for v = 0."""
    scale = torch.linalg.vector_norm(v)
    return float(torch.linalg.vector_norm(v - operator(x)) / scale) if scale > 0 else 0.0
