"""Downstream tasks, the upper level: one task per file, registered in `DOWNSTREAM_TASKS`."""

from bissl_zoo.downstream.classification import Classification
from bissl_zoo.downstream.detection import DetectionTask, FasterRCNN
from bissl_zoo.downstream.detectron2 import Detectron2FasterRCNN
from bissl_zoo.downstream.multilabel import MultilabelClassification
from bissl_zoo.downstream.task import DownstreamTask, Evaluator

__all__ = [
    "Classification",
    "DetectionTask",
    "Detectron2FasterRCNN",
    "DownstreamTask",
    "Evaluator",
    "FasterRCNN",
    "MultilabelClassification",
]
