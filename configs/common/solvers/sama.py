"""SAMA: the plain gradient corrected for the optimizer of the lower level, no products."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="sama")
