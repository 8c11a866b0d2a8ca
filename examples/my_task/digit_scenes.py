"""The quickstart with counting in the place of detection."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

from ...configs.quickstart.digit_scenes_det import *

train.imports = ["examples/my_task/counting.py"]  # registers "counting"
train.output_dir, train.publish.name = "runs/counting", "resnet18.simclr_bissl_digit_counts"
task = L(build_task)(name="counting", image_size=96)
