"""Evaluators with `process`, `synchronize` (over ranks) and `evaluate`, which returns metrics as fractions in [0, 1].

Probes and collapse metrics evaluate frozen features without a task.
"""

from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.evaluation.detection import DetectionEvaluator, average_precision, voc_average_precision
from bissl_zoo.evaluation.multilabel import MultilabelEvaluator
from bissl_zoo.evaluation.probes import (
    LinearProbe,
    alignment,
    collapse_metrics,
    effective_rank,
    knn_accuracy,
    knn_probabilities,
    linear_probe,
    normalized_std,
    uniformity,
)

__all__ = [
    "DetectionEvaluator",
    "LinearProbe",
    "MultilabelEvaluator",
    "TopKEvaluator",
    "alignment",
    "average_precision",
    "collapse_metrics",
    "effective_rank",
    "knn_accuracy",
    "knn_probabilities",
    "linear_probe",
    "normalized_std",
    "uniformity",
    "voc_average_precision",
]
