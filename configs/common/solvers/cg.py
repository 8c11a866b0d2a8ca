"""Conjugate gradient with the authors' numbers as a joint solve; solver.blockwise=True is their variant."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="cg", iterations=5, damping=10.0, tolerance=1e-3, blockwise=False)
