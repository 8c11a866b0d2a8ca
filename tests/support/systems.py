"""Random matrices with a known spectrum, as the tests of this folder solve them."""

import torch

from bissl_zoo.hypergradient import DenseOperator


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated(eigenvalues, seed, dtype=torch.float64):
    """A symmetric matrix with these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=dtype)
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed, dtype=dtype))
    matrix = q @ torch.diag(values) @ q.T
    return (matrix + matrix.T) / 2


def system(matrix, block_sizes=None):
    """`A` itself is the matrix."""
    return DenseOperator(matrix - torch.eye(len(matrix), dtype=matrix.dtype), block_sizes=block_sizes)


def residual(matrix, x, v):
    return float((v - matrix @ x).norm() / v.norm())
