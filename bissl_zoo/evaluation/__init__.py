"""Evaluators: `process` batches, `synchronize` over ranks, `evaluate` to a dict of metrics as fractions in [0, 1].

Probes and collapse monitors judge frozen features, without a task.
"""

from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.evaluation.collapse import alignment, collapse_figures, effective_rank, normalized_std, uniformity
from bissl_zoo.evaluation.detection import DetectionEvaluator, average_precision, voc_average_precision
from bissl_zoo.evaluation.multilabel import MultilabelEvaluator
from bissl_zoo.evaluation.probes import LinearProbe, knn_accuracy, knn_probabilities, linear_probe

__all__ = [
    "DetectionEvaluator",
    "LinearProbe",
    "MultilabelEvaluator",
    "TopKEvaluator",
    "alignment",
    "average_precision",
    "collapse_figures",
    "effective_rank",
    "knn_accuracy",
    "knn_probabilities",
    "linear_probe",
    "normalized_std",
    "uniformity",
    "voc_average_precision",
]
