"""M-FAC: curvature from the gradients of the lower steps, no products; damping is lambda itself."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

solver = L(build_solver)(name="mfac", gradients=20, blocks="layer", store="device")
