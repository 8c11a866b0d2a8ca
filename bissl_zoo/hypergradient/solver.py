"""The interface of hypergradient solvers: the linear operator they take and the solution they return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bissl_zoo.hypergradient.subspace import Subspace

#: delta, added to lambda in the solver only: a number, or "auto" to choose it from the spectrum in each alternation
Damping = float | Literal["auto"]


class LinearOperator(ABC):
    """`A = I + H / shift` for a symmetric `H (P, P)` that is given by its matrix-vector products.

    Attributes:
        block_sizes: lengths of the parameter tensors in a flat vector; they sum to P.
        shift: lambda + damping, positive; None until the damping is chosen.
        automatic: True if the damping is chosen from the spectrum. A solver may raise it, and negative Ritz values of
            the subspace count with their absolute value, see :meth:`Subspace.absolute_images`.
        subspace: products with `H` from earlier solves; a solver may reuse them and add its own.
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
        """Return `H @ u` for `u (P,)` in a new vector, which the caller may overwrite."""

    def matvec(self, u: Tensor) -> Tensor:
        """Return `A @ u` for `u (P,)`.

        Raises:
            RuntimeError: the shift is None.
        """
        if self.shift is None:
            raise RuntimeError("The damping is not chosen yet; set `shift` before products with A.")
        product = self.hessian_product(u)
        if self.automatic:
            self.subspace.add_reflection(product, u)
        return torch.add(u, product, alpha=1.0 / self.shift)

    __call__ = matvec


class DenseOperator(LinearOperator):
    """Operator of an explicit symmetric matrix, for tests and small problems.

    Attributes:
        hessian: `H`, `(P, P)`.
        products: number of products computed so far.
    """

    def __init__(self, hessian: Tensor, shift: float | None = 1.0, block_sizes: list[int] | None = None) -> None:
        super().__init__(block_sizes or [len(hessian)], shift)
        self.hessian = hessian
        self.products = 0

    def hessian_product(self, u: Tensor) -> Tensor:
        """Return `H @ u` for `u (P,)`."""
        self.products += 1
        return self.hessian @ u


@dataclass(frozen=True)
class Solution:
    """Approximate solution of `A x = v`.

    Attributes:
        x: flat `(P,)`, always finite.
        residual: true relative residual `||v - A x|| / ||v||`, not that of a recurrence; None if the solver does not
            compute it.
        products: number of products with `A`, including the one for the residual.
        status: `converged`, `max_iterations`, `negative_curvature`, `diverged`, `non_finite`, `singular`, or
            `not_solved` if the solver does not measure a residual.
    """

    x: Tensor
    residual: float | None
    products: int
    status: str


def power_of_two(v: Tensor) -> Tensor:
    """Return the largest power of two that is at most `max |v|`; `v` must be finite and not zero.

    Dividing by it is exact, and prevents overflow and underflow of squares in float32.
    """
    largest = v.abs().max()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)


def relative_residual(operator: LinearOperator, x: Tensor, v: Tensor) -> float:
    """Return `||v - A x|| / ||v||`, or 0 for v = 0; costs one product."""
    scale = torch.linalg.vector_norm(v)
    return float(torch.linalg.vector_norm(v - operator(x)) / scale) if scale > 0 else 0.0
