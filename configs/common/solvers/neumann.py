"""Truncated Neumann series, for comparisons; it needs more products than minres or cg."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="neumann", iterations=10, tolerance=0.05, damping="auto")
