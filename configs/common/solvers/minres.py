"""Minimal residuals that start from the earlier solves of the alternation, automatic damping: solved, and cheap."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="minres", iterations=6, tolerance=0.05, damping="auto")
