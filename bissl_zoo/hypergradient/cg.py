"""Conjugate gradient, joint and blockwise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bissl_zoo.hypergradient.solver import Damping, LinearOperator, Solution, power_of_two, relative_residual


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradient for `A x = v` with `A` symmetric (Hestenes and Stiefel, 1952).

    Args:
        iterations: most products spent on the solution; one more measures its residual.
        tolerance: relative residual at which to stop.
        damping: delta, added to lambda in `A = I + H / (lambda + delta)`; "auto" chooses it each alternation.
        blockwise: keep a separate step length per parameter tensor and run all iterations unguarded, as the BiSSL
            authors do. This is not a solve of the joint system: it converges only where the curvature between tensors
            is small against lambda + delta. The status tells; the iterate is returned all the same.
        growth: a residual that exceeds `||v||` by this factor counts as divergence.
        check: spend one more product on the true residual; without it the residual is None, and the status that of the
            recurrence.
    """

    iterations: int = 5
    tolerance: float = 1e-3
    damping: Damping = 10.0
    blockwise: bool = False
    growth: float = 10.0
    check: bool = True

    def __call__(self, operator: LinearOperator, v: Tensor) -> Solution:
        """Solve from x = 0; see :class:`Solution` for what comes back.

        Negative curvature, a residual that grows and a non-finite product end the joint solve with the best iterate so
        far, or `v` where its residual is smaller; a non-finite `v` is answered by zero.
        """
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
        x, r, p = torch.zeros_like(v), v.clone(), v.clone()  # long vectors are slow to allocate: updated in place
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
    """Inner product of each block: two `(P,)` -> `(blocks,)`."""
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(sizes), b.split(sizes), strict=True)])


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient, 0 where a block has nothing left to do (0 / 0)."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)
