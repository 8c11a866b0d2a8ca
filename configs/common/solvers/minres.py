"""Minimal residuals recycled between the solves of an alternation, with automatic damping: accurate and cheap."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="minres", iterations=6, tolerance=0.05, damping="auto")
