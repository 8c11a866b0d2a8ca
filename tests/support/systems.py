"""Random matrices with a known spectrum, and dense references for solvers."""

import numpy as np
import torch

from bissl_zoo.hypergradient import DenseOperator


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated(eigenvalues, seed, dtype=torch.float64):
    """Return a symmetric matrix with the given eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=dtype)
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed, dtype=dtype))
    matrix = q @ torch.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def system(matrix, block_sizes=None, kind=DenseOperator, **options):
    """Return an operator whose `A` is `matrix`."""
    return kind(matrix - torch.eye(len(matrix), dtype=matrix.dtype), block_sizes=block_sizes, **options)


class Breaking(DenseOperator):
    """Operator whose products are not finite after the first `after`."""

    def __init__(self, hessian, after, bad=float("nan"), **options):
        super().__init__(hessian, **options)
        self.after, self.bad = after, bad

    def hessian_product(self, u):
        product = super().hessian_product(u)
        return product if self.products <= self.after else product * self.bad


def residual(matrix, x, v):
    return float((v - matrix @ x).norm() / v.norm())


def krylov_basis(matrix, v, steps):
    """Return an orthonormal basis of `span{v, A v, ...}`, `(P, steps)`, by Arnoldi in numpy."""
    columns = [v.numpy() / np.linalg.norm(v.numpy())]
    for _ in range(steps - 1):
        w = matrix.numpy() @ columns[-1]
        for _ in range(2):
            q = np.stack(columns, axis=1)
            w = w - q @ (q.T @ w)
        columns.append(w / np.linalg.norm(w))
    return np.stack(columns, axis=1)
