"""Samples in Detectron2's format and its COCO evaluator; imports Detectron2."""

import contextlib
import io
import json
import math
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from bissl_zoo.downstream.detection import require_boxes
from bissl_zoo.evaluation.detection import DetectionEvaluator


class Mapper:
    """Map `(PIL image, target)` to Detectron2's dict of an image and a target, as its DatasetMapper does for a file.

    The image is uint8 RGB `(3, h, w)` after ResizeShortestEdge and RandomFlip. For training the boxes of the target are
    transformed with it and empty ones are removed; otherwise the target is unchanged.
    """

    def __init__(self, train: bool, short_sides: Sequence[int], max_size: int, flip_probability: float) -> None:
        resize = T.ResizeShortestEdge(list(short_sides), max_size, "choice")
        self.train = train
        self.augmentations = T.AugmentationList([resize, T.RandomFlip(flip_probability)])

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        require_boxes(target)
        seen = T.AugInput(detection_utils.convert_PIL_to_numpy(image, "RGB"))
        applied = self.augmentations(seen)
        pixels = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))
        sample = {"image": pixels, "height": image.height, "width": image.width, "image_id": target["image_id"]}
        return sample, self._moved(target, applied, seen.image.shape[:2]) if self.train else target

    def _moved(self, target: dict[str, Any], applied: T.TransformList, size: tuple[int, int]) -> dict[str, Any]:
        objects = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
            for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        moved = [detection_utils.transform_instance_annotations(item, applied, size) for item in objects]
        instances = detection_utils.annotations_to_instances(moved, size)
        instances, mask = detection_utils.filter_empty_instances(instances, return_mask=True)
        boxes, labels = instances.gt_boxes.tensor, instances.gt_classes
        return {**target, "boxes": boxes, "labels": labels, "difficult": target["difficult"][mask]}


def with_instances(image: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Return the dict that Detectron2 trains on: an image of the mapper with its objects that are not difficult."""
    counts = ~target["difficult"]
    instances = Instances(tuple(image["image"].shape[-2:]))
    instances.gt_boxes, instances.gt_classes = Boxes(target["boxes"][counts]), target["labels"][counts]
    return {**image, "instances": instances}


class Detectron2Evaluator(DetectionEvaluator):
    """Compute the common metrics and those of Detectron2's COCOEvaluator as `detectron2_AP` and so on, as fractions.

    COCOEvaluator treats difficult objects as crowds: ignored, but their overlap with a detection is relative to the
    area of the detection. Metrics that are NaN, such as AP of small objects without such objects, are left out.
    """

    def evaluate(self) -> dict[str, float]:
        """Return the metrics by name; the two kinds of AP differ only for difficult objects."""
        metrics = super().evaluate()
        for name, value in self._coco_metrics().items():
            metrics[f"detectron2_{name.replace('-', '/', 1)}"] = value  # AP-cat, a metric of one class, becomes AP/cat
        return metrics

    def _coco_metrics(self) -> dict[str, float]:
        if not any(len(predicted["boxes"]) for predicted, _ in self._records.values()):
            return {name: 0.0 for name in ("AP", "AP50", "AP75")}  # Detectron2 returns NaN without any detection
        name = f"bissl_zoo_{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            truth = Path(folder) / "truth.json"
            truth.write_text(json.dumps(self._coco_truth()))
            MetadataCatalog.get(name).set(json_file=str(truth), thing_classes=self.classes)
            try:
                evaluator = COCOEvaluator(name, ("bbox",), distributed=False, use_fast_impl=False)
            finally:
                MetadataCatalog.remove(name)
            evaluator.reset()
            for image_id, (predicted, _) in sorted(self._records.items()):
                evaluator.process([{"image_id": image_id}], [{"instances": _instances(predicted)}])
            percent = evaluator.evaluate()["bbox"]
        return {name: value / 100 for name, value in percent.items() if not math.isnan(value)}

    def _coco_truth(self) -> dict[str, Any]:
        objects = [
            {"image_id": image_id, "category_id": int(label), "iscrowd": int(difficult), "corners": box.tolist()}
            for image_id, (_, truth) in sorted(self._records.items())
            for box, label, difficult in zip(truth["boxes"], truth["labels"], truth["difficult"], strict=True)
        ]
        for number, item in enumerate(objects, start=1):  # id 0 means "not matched" in pycocotools
            x0, y0, x1, y1 = item.pop("corners")
            item.update(id=number, bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0))
        return {
            "info": {},
            "images": [{"id": image_id} for image_id in sorted(self._records)],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes)],
            "annotations": objects,
        }


def _instances(predicted: dict[str, np.ndarray]) -> Instances:
    boxes, scores, labels = (torch.from_numpy(predicted[key]) for key in ("boxes", "scores", "labels"))
    return Instances((0, 0), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
