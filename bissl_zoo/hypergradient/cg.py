"""Conjugate gradient on the joint system, and the blockwise variant of the BiSSL authors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.minres import MinRes
from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two, relative_residual


@dataclass(frozen=True)
class ConjugateGradient:
    """Solve `A x = v` for a symmetric `A` by conjugate gradient (Hestenes and Stiefel, 1952).

    Args:
        iterations: maximum number of products for the solution; `check` adds one.
        tolerance: relative residual at which to stop.
        damping: delta in `A = I + H / (lambda + delta)`; "auto" chooses it in each alternation.
        blockwise: use a separate step length for each parameter tensor and always run all iterations, as the BiSSL
            authors do. This does not solve the joint system: it converges only if the curvature between tensors is
            small compared with lambda + delta. The last iterate is returned in any case; see its status.
        growth: the solve has diverged if the residual exceeds `growth * ||v||`.
        check: compute the true residual with one more product; otherwise the residual is None and the status comes from
            the recurrence.
    """

    iterations: int = 5
    tolerance: float = 1e-3
    damping: Damping = 10.0
    blockwise: bool = False
    growth: float = 10.0
    check: bool = True

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve `A x = v` for `v (P,)`, starting from x = 0.

        The joint solve stops at negative curvature, a growing residual or a non-finite product, and returns the best
        iterate so far, or `v` if the residual of `v` is smaller. The solution for a non-finite `v` is zero.

        With damping that is chosen from the spectrum, the products of the choice span the Krylov space of the first
        right-hand side. The joint solve then minimizes the residual over this space, which needs no further product.
        """
        if operator.automatic and not self.blockwise:
            return MinRes(self.iterations, self.tolerance, recycle=0, recycled_iterations=self.iterations)(operator, v)
        if not torch.isfinite(v).all():
            return Solution(torch.zeros_like(v), float("inf"), 0, "non_finite")
        if not v.any():
            return Solution(v, 0.0, 0, "converged")
        scale = power_of_two(v)
        right = v / scale
        x, status, products = self._blockwise(operator, right) if self.blockwise else self._joint(operator, right)
        residual = relative_residual(operator, x, right) if self.check else None
        products += self.check
        x = x * scale
        if not torch.isfinite(x).all() or (self.check and not math.isfinite(residual)):
            return Solution(v, float("inf"), products, "non_finite")
        if not self.check:
            return Solution(x, None, products, status)
        if residual <= self.tolerance:
            status = "converged"
        elif status == "max_iterations" and residual > 1.0:
            status = "diverged"
        return Solution(x, residual, products, status)

    def _joint(self, operator: LinearOperator, v: Tensor) -> tuple[Tensor, str, int]:
        scale = torch.linalg.vector_norm(v)
        x, r, p = torch.zeros_like(v), v.clone(), v.clone()  # updated in place: long vectors are slow to allocate
        best, best_norm = v, math.inf
        r_dot_r = torch.dot(r, r)
        status, products = "max_iterations", 0
        for products in range(1, self.iterations + 1):
            product = operator(p)
            if products == 1:
                residual_of_v = torch.linalg.vector_norm(v - product)
            curvature = torch.dot(p, product)
            if not torch.isfinite(curvature):
                status = "non_finite"
                break
            if curvature <= 0:
                status = "negative_curvature"
                break
            step = r_dot_r / curvature
            x.addcmul_(p, step)
            r.addcmul_(product, step, value=-1)
            r_dot_r, previous = torch.dot(r, r), r_dot_r
            norm = r_dot_r.sqrt()
            if norm <= self.tolerance * scale:
                return x, "converged", products
            if not norm <= self.growth * scale:
                status = "diverged"
                break
            if norm < best_norm:
                best, best_norm = x.clone(), norm
            p.mul_(r_dot_r / previous).add_(r)
        else:
            if not self.iterations or norm <= scale:
                return x, status, products
            status = "diverged"
        return (v if residual_of_v < best_norm else best), status, products

    def _blockwise(self, operator: LinearOperator, v: Tensor) -> tuple[Tensor, str, int]:
        sizes = operator.block_sizes
        x, r, p = torch.zeros_like(v), v.clone(), v.clone()
        r_dot_r = _block_dots(r, r, sizes)
        status = "max_iterations"
        for products in range(1, self.iterations + 1):
            product = operator(p)
            curvature = _block_dots(p, product, sizes)
            if not torch.isfinite(curvature).all():
                return v, "non_finite", products
            if curvature.sum() < 0:
                status = "negative_curvature"
            steps = _ratio(r_dot_r, curvature)
            blocks = (t.split(sizes) for t in (x, p, r, product))
            for step, x_block, p_block, r_block, product_block in zip(steps, *blocks, strict=True):
                x_block.addcmul_(p_block, step)
                r_block.addcmul_(product_block, step, value=-1)
            r_dot_r, previous = _block_dots(r, r, sizes), r_dot_r
            for ratio, p_block in zip(_ratio(r_dot_r, previous), p.split(sizes), strict=True):
                p_block.mul_(ratio)
            p.add_(r)
        return x, status, self.iterations


def _block_dots(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """Return the inner product of each block of two `(P,)` vectors, `(blocks,)`."""
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(sizes), b.split(sizes), strict=True)])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the elementwise quotient, with 0 for a zero denominator: a block that has converged."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)
