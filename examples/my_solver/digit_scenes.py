"""The quickstart with the minimal residual iteration instead of MINRES."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_solver

from ...configs.quickstart.digit_scenes_det import *

train.imports = ["examples/my_solver/minimal_residual.py"]  # registers "minimal_residual"
train.output_dir, train.publish.name = "runs/minimal_residual", "resnet18.simclr_bissl_minimal_residual"
solver = L(build_solver)(name="minimal_residual", iterations=8)
