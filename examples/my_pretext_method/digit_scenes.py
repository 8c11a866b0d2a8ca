"""The quickstart with the rotation method instead of SimCLR."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_pretext

from ...configs.quickstart.digit_scenes_det import *

train.imports = ["examples/my_pretext_method/rotation.py"]  # registers "rotation"
train.output_dir, train.publish.name = "runs/rotation", "resnet18.rotation_bissl_digit_scenes"
pretext = L(build_pretext)(name="rotation", augmentation=pretext.augmentation)
