"""No curvature: joint training of both objectives, the cheap baseline."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="identity")
