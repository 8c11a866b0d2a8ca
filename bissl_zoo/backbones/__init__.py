"""Backbones: timm models as feature maps, split into a shared trunk and a tail."""

from bissl_zoo.backbones.backbone import (
    Backbone,
    FeatureInfo,
    SplitError,
    Tail,
    evaluating,
    merge_split_states,
    timm_backbone,
)

__all__ = ["Backbone", "FeatureInfo", "SplitError", "Tail", "evaluating", "merge_split_states", "timm_backbone"]
