"""The quickstart with segmentation of generated shapes in place of detection; no download."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_dataset, build_task

from ...configs.quickstart.digit_scenes_det import *

train.imports = ["examples/segmentation/segmentation.py"]  # registers "segmentation" and "shapes"
train.output_dir, train.publish.name = "runs/segmentation", "resnet18.simclr_bissl_shapes"
task = L(build_task)(name="segmentation", image_size=64)
dataloader.pretext.dataset = L(build_dataset)(name="shapes", split="unlabeled", images=1000)
dataloader.train.dataset = L(build_dataset)(name="shapes", split="train", images=500)
dataloader.test.dataset = L(build_dataset)(name="shapes", split="test", images=200)
