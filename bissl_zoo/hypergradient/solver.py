"""What every hypergradient solver takes and returns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bissl_zoo.hypergradient.subspace import Subspace

#: delta, added to lambda in the solver only: a number, or chosen from the spectrum once per alternation
Damping = float | Literal["auto"]


class LinearOperator(ABC):
    """`A = I + H / shift` for a symmetric `H (P, P)` known by its products.

    Attributes:
        block_sizes: lengths of the parameter tensors in a flat vector; they sum to P.
        shift: lambda + damping, positive; None until the damping is chosen.
        automatic: whether the damping is chosen from the spectrum, and may rise.
        subspace: products with `H` that earlier solves left; a solver may start from them and add its own.
    """

    def __init__(self, block_sizes: list[int], shift: float | None = 1.0) -> None:
        if shift is not None and not shift > 0:
            raise ValueError(f"shift (lambda + damping) must be positive, not {shift}")
        self.block_sizes = block_sizes
        self.shift = shift
        self.automatic = shift is None
        self.subspace = Subspace()

    @abstractmethod
    def hessian_product(self, u: Tensor) -> Tensor:
        """`H @ u` for a flat `(P,)` vector, in a vector of its own, which the caller may overwrite."""

    def matvec(self, u: Tensor) -> Tensor:
        """`A @ u` for a flat `(P,)` vector.

        Raises:
            RuntimeError: the shift has not been chosen yet.
        """
        if self.shift is None:
            raise RuntimeError("A product with A before its damping was chosen; set `shift` first.")
        return torch.add(u, self.hessian_product(u), alpha=1.0 / self.shift)

    __call__ = matvec


class DenseOperator(LinearOperator):
    """The operator of a symmetric matrix that is there in full.

    Args:
        hessian: `(P, P)`.
        products: how many have been asked for.
    """

    def __init__(self, hessian: Tensor, shift: float | None = 1.0, block_sizes: list[int] | None = None) -> None:
        super().__init__(block_sizes or [len(hessian)], shift)
        self.hessian = hessian
        self.products = 0

    def hessian_product(self, u: Tensor) -> Tensor:
        """`H @ u` for a flat `(P,)` vector."""
        self.products += 1
        return self.hessian @ u


@dataclass(frozen=True)
class Solution:
    """An approximate solution of `A x = v`.

    Attributes:
        x: flat `(P,)`, finite whatever happened.
        residual: `||v - A x|| / ||v||`, from products with `A` and not from a recurrence; None where the solver spends
            no product on it.
        products: how many times `A` was applied, the one for the residual included.
        status: `converged`, `max_iterations`, `negative_curvature`, `diverged`, `non_finite`, `singular`, or
            `not_solved` from solvers that solve nothing.
    """

    x: Tensor
    residual: float | None
    products: int
    status: str


def power_of_two(v: Tensor) -> Tensor:
    """The largest power of two up to the largest magnitude in `v`, which must be finite and not zero.

    Squares of a vector far from 1 do not fit float32; dividing by a power of two keeps every digit.
    """
    largest = v.abs().max()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)


def relative_residual(operator: LinearOperator, x: Tensor, v: Tensor) -> float:
    """`||v - A x|| / ||v||` at the price of one product; 0 for v = 0."""
    scale = torch.linalg.vector_norm(v)
    return float(torch.linalg.vector_norm(v - operator(x)) / scale) if scale > 0 else 0.0
