"""COCO's precision by pycocotools, which the extra `train` installs."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class _COCOeval(COCOeval):
    """COCO evaluation with VOC's difficult objects as crowds.

    pycocotools ignores only crowds, and measures the overlap with a crowd relative to the detection. A difficult object
    must be ignored like a crowd, but matched by IoU like any other object.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        objects, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        if not objects or not detections:
            return []
        order = np.argsort([-d["score"] for d in detections], kind="stable")[: self.params.maxDets[-1]]
        return coco_mask.iou([detections[i]["bbox"] for i in order], [o["bbox"] for o in objects], [0] * len(objects))


def coco_precision(
    predictions: Sequence[dict[str, np.ndarray]], truth: Sequence[dict[str, np.ndarray]], num_classes: int
) -> np.ndarray:
    """Return COCO's precision `(10 IoU thresholds, 101 recalls, K)`; -1 for a class without objects."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its results
        evaluation = _COCOeval(_coco_set(truth, num_classes), _coco_set(predictions, num_classes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


def _coco_set(records: Sequence[dict[str, np.ndarray]], num_classes: int) -> COCO:
    annotations = []
    for number, record in enumerate(records):
        sizes = record["boxes"][:, 2:] - record["boxes"][:, :2]
        for i, label in enumerate(record["labels"].tolist()):
            annotation = {
                "id": len(annotations) + 1,  # 0 means "not matched" in pycocotools
                "image_id": number,
                "category_id": label,
                "bbox": [*record["boxes"][i, :2].tolist(), *sizes[i].tolist()],
                "area": float(sizes[i].prod()),
                "iscrowd": int(record["difficult"][i]) if "difficult" in record else 0,
            }
            if "scores" in record:
                annotation["score"] = float(record["scores"][i])
            annotations.append(annotation)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(len(records))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
