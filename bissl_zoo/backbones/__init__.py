"""Backbones: timm models as feature maps, split into a shared trunk and a tail."""

from bissl_zoo.backbones.backbone import (
    POOLED,
    Backbone,
    FeatureInfo,
    Pool,
    SplitError,
    Tail,
    evaluating,
    merge_split_states,
    pooled_width,
    share,
    tail_input,
    timm_backbone,
)

__all__ = [
    "POOLED",
    "Backbone",
    "FeatureInfo",
    "Pool",
    "SplitError",
    "Tail",
    "evaluating",
    "merge_split_states",
    "pooled_width",
    "share",
    "tail_input",
    "timm_backbone",
]
