"""Evaluators: `process` batches, `synchronize` over ranks, `evaluate` to a dict of metrics as fractions in [0, 1]."""

from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.evaluation.detection import DetectionEvaluator, average_precision, voc_average_precision

__all__ = ["DetectionEvaluator", "TopKEvaluator", "average_precision", "voc_average_precision"]
