"""Single-label classification."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

task = L(build_task)(name="classification", image_size=96)
