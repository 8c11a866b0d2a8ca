"""Samples as Detectron2 takes them, and the figures of its evaluator; imports Detectron2."""

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

from bissl_zoo.evaluation.detection import DetectionEvaluator


class Mapper:
    """`(PIL image, target)` -> Detectron2's dict of an image and a target, as its DatasetMapper does from a file.

    The image is uint8 RGB `(3, h, w)` after ResizeShortestEdge and RandomFlip. To train, the target's boxes moved with
    it and those of which nothing is left are gone; else the target is that of the image as it was.
    """

    def __init__(self, train: bool, short_sides: Sequence[int], max_size: int, flip_probability: float) -> None:
        resize = T.ResizeShortestEdge(list(short_sides), max_size, "choice")
        self.train = train
        self.augmentations = T.AugmentationList([resize, T.RandomFlip(flip_probability)])

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
        moved = [detection_utils.transform_instance_annotations(one, applied, size) for one in objects]
        instances = detection_utils.annotations_to_instances(moved, size)
        instances, kept = detection_utils.filter_empty_instances(instances, return_mask=True)
        boxes, labels = instances.gt_boxes.tensor, instances.gt_classes
        return {**target, "boxes": boxes, "labels": labels, "difficult": target["difficult"][kept]}


def with_instances(image: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """The dict that Detectron2 trains on: an image of the mapper's and its objects, but for the difficult ones."""
    counts = ~target["difficult"]
    instances = Instances(tuple(image["image"].shape[-2:]))
    instances.gt_boxes, instances.gt_classes = Boxes(target["boxes"][counts]), target["labels"][counts]
    return {**image, "instances": instances}


class Detectron2Evaluator(DetectionEvaluator):
    """The common figures and, as `detectron2_AP` and so on, fractions as well, those of Detectron2's COCOEvaluator.

    Difficult objects are crowds to it: ignored, but a detection overlaps a crowd with the share of its own area, not
    with the IoU. What it calls NaN, such as the AP of small objects where there are none, is left out.
    """

    def evaluate(self) -> dict[str, float]:
        """See :class:`DetectionEvaluator`; the figures of the two differ only where objects are difficult."""
        figures = super().evaluate()
        for name, value in self._coco_figures().items():
            figures[f"detectron2_{name.replace('-', '/', 1)}"] = value  # AP-cat is AP/cat, a figure of one class
        return figures

    def _coco_figures(self) -> dict[str, float]:
        if not any(len(found["boxes"]) for found, _ in self._records.values()):
            return {name: 0.0 for name in ("AP", "AP50", "AP75")}  # Detectron2 says NaN, but nothing was found
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
            for image_id, (found, _) in sorted(self._records.items()):
                evaluator.process([{"image_id": image_id}], [{"instances": _instances(found)}])
            percent = evaluator.evaluate()["bbox"]
        return {name: value / 100 for name, value in percent.items() if not math.isnan(value)}

    def _coco_truth(self) -> dict[str, Any]:
        objects = [
            {"image_id": image_id, "category_id": int(label), "iscrowd": int(difficult), "corners": box.tolist()}
            for image_id, (_, truth) in sorted(self._records.items())
            for box, label, difficult in zip(truth["boxes"], truth["labels"], truth["difficult"], strict=True)
        ]
        for number, one in enumerate(objects, start=1):  # pycocotools takes 0 for "not matched"
            x0, y0, x1, y1 = one.pop("corners")
            one.update(id=number, bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0))
        return {
            "info": {},
            "images": [{"id": image_id} for image_id in sorted(self._records)],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.classes)],
            "annotations": objects,
        }


def _instances(found: dict[str, np.ndarray]) -> Instances:
    boxes, scores, labels = (torch.from_numpy(found[key]) for key in ("boxes", "scores", "labels"))
    return Instances((0, 0), pred_boxes=Boxes(boxes), scores=scores, pred_classes=labels)
