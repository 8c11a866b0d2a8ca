"""Detectron2's Faster R-CNN with the numbers of `faster_rcnn.py` and its own defaults otherwise."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

task = L(build_task)(
    name="detectron2_faster_rcnn",
    config="C4",  # or FPN, with backbone.out_features=[c2,c3,c4,c5] bilevel.shared_stage=c5
    min_size=196,
    max_size=320,
    anchor_sizes=[16, 32, 64, 128, 256],
    anchor_ratios=[0.5, 1.0, 2.0],
    roi_size=7,
    sampling_ratio=2,
    box_head=1024,  # null: Detectron2's res5
    evaluator="detectron2",  # detectron2: the common metrics and its own; common: the former only
    overrides={},  # further values by their key in Detectron2's model: {proposal_generator.nms_thresh: 0.6}
)
