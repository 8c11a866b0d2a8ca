"""Low-rank approximation of the curvature, once per alternation; with check=False, solves need no products."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="nystrom", rank=10, tolerance=0.05, damping="auto", check=True)
