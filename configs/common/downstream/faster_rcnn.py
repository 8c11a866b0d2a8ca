"""Faster R-CNN on a single feature map, R50-C4 in the papers."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

task = L(build_task)(
    name="faster_rcnn",
    min_size=196,
    max_size=320,
    anchor_sizes=[16, 32, 64, 128, 256],
    anchor_ratios=[0.5, 1.0, 2.0],
    roi_size=7,
    sampling_ratio=2,
    box_head=1024,
)
