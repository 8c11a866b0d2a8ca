"""Evaluators with `process`, `synchronize` (over ranks) and `evaluate`, which returns metrics as fractions in [0, 1].

Probes and collapse metrics evaluate frozen features without a task.
"""

from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.evaluation.detection import DetectionEvaluator
from bissl_zoo.evaluation.multilabel import MultilabelEvaluator
from bissl_zoo.evaluation.probes import collapse_metrics, knn_accuracy, linear_probe

__all__ = [
    "DetectionEvaluator",
    "MultilabelEvaluator",
    "TopKEvaluator",
    "collapse_metrics",
    "knn_accuracy",
    "linear_probe",
]
