"""Faster R-CNN on a feature pyramid; set backbone.out_features = ["c2", "c3", "c4", "c5"]."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

task = L(build_task)(
    name="faster_rcnn",
    min_size=196,
    max_size=320,
    fpn_channels=256,
    anchor_sizes=[16, 32, 64, 128, 256],  # one per map; half the paper's, whose images have 800 pixels
    anchor_ratios=[0.5, 1.0, 2.0],
    roi_size=7,
    sampling_ratio=2,
    box_head=1024,
)
