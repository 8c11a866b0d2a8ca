"""The bilevel problem: two levels tied through the backbone, solved by alternation (arXiv 2410.02387)."""

from bissl_zoo.bilevel.algorithm import Adaptation, BiLevel, UpperGradients, refuse_sync_batch_norm
from bissl_zoo.bilevel.level import Level

__all__ = ["Adaptation", "BiLevel", "Level", "UpperGradients", "refuse_sync_batch_norm"]
