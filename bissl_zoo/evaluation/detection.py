"""Average precision of object detection as defined by Pascal VOC and COCO."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.errors import BisslZooError, DatasetError


class DetectionEvaluator:
    """Detection metrics as fractions in [0, 1], over the whole data set.

    - `AP` (mean over IoU 0.50:0.95), `AP50`, `AP75` and `AP50/<class>`: COCO, computed by pycocotools with 101 recall
      points and at most 100 detections per image and class.
    - `voc_AP50`: area under the precision envelope (VOC 2010 and later).
    - `voc07_AP50`: mean precision at the 11 recalls 0, 0.1, ... 1 (VOC 2007).

    Means are over the classes with objects. Objects marked `difficult` are ignored: they need not be detected, and
    detections of them are neither correct nor wrong.

    Args:
        classes: names of the K classes, in the order of the labels.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Discard all processed images."""
        self._records: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}

    def process(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch; an image that was processed before is replaced.

        Args:
            predictions: per image `boxes (M, 4)` as x0, y0, x1, y1 in pixels, `scores (M,)` and `labels (M,)`.
            targets: per image `boxes (N, 4)`, `labels (N,)`, `difficult (N,)` and `image_id`.
        Raises:
            BisslZooError: the lengths differ, a label is not a class, or a box or score is not finite.
        """
        if len(predictions) != len(targets):
            raise BisslZooError(f"Detection evaluation: {len(predictions)} predictions for {len(targets)} images.")
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = int(target["image_id"])
            predicted, truth = _arrays(prediction, "scores"), _arrays(target, "difficult")
            if not (np.isfinite(predicted["boxes"]).all() and np.isfinite(predicted["scores"]).all()):
                raise BisslZooError(
                    f"Detection evaluation, image {image_id}: a predicted box or score is NaN or infinite; "
                    "the model has diverged."
                )
            for what, labels in (("predicted", predicted["labels"]), ("true", truth["labels"])):
                if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
                    raise BisslZooError(
                        f"Detection evaluation, image {image_id}: {what} labels range from {labels.min()} to "
                        f"{labels.max()}, but there are {len(self.classes)} classes, counted from 0."
                    )
            self._records[image_id] = (predicted, truth)

    def synchronize(self) -> None:
        """Gather the images of all ranks; call it on every rank. Images processed on several ranks count once."""
        self._records = {
            image_id: pair for part in all_gather_objects(self._records) for image_id, pair in part.items()
        }

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of all images since `reset`.

        Raises:
            DatasetError: there are no images, or no objects that are not difficult.
        """
        per_class = self.per_class()
        names = next(iter(per_class.values()))
        means = {name: fmean(metrics[name] for metrics in per_class.values()) for name in names}
        return means | {f"AP50/{name}": metrics["AP50"] for name, metrics in per_class.items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return the metrics of each class with objects that are not difficult: `{"cat": {"AP": 0.4, ...}}`.

        Raises:
            DatasetError: see :meth:`evaluate`.
        """
        if not self._records:
            raise DatasetError("Detection evaluation: no image was processed. Is the test set empty?")
        # by image id, so that the order of equal scores does not depend on the number of ranks
        predictions, truth = zip(*(self._records[image_id] for image_id in sorted(self._records)), strict=True)
        if all(target["difficult"].all() for target in truth):
            raise DatasetError(
                f"Detection evaluation: the {len(truth)} images have no objects, or only difficult ones; "
                "average precision is not defined."
            )
        rankings = _match(predictions, truth, len(self.classes), iou_threshold=0.5)
        precision = _coco_precision(predictions, truth, len(self.classes)).mean(axis=1)  # (10 IoUs, K)
        return {
            name: {
                "AP": float(by_iou.mean()),
                "AP50": float(by_iou[0]),
                "AP75": float(by_iou[5]),
                "voc_AP50": average_precision(*ranking),
                "voc07_AP50": average_precision(*ranking, eleven_point=True),
            }
            for name, by_iou, ranking in zip(self.classes, precision.T, rankings, strict=True)
            if ranking[1]
        }


def voc_average_precision(
    predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], num_classes: int
) -> np.ndarray:
    """Return `voc_AP50` per class, float64 `(K,)`; NaN for a class without objects that are not difficult.

    Args:
        predictions, targets: as in :meth:`DetectionEvaluator.process`.
        num_classes: K.
    """
    arrays = [_arrays(prediction, "scores") for prediction in predictions]
    truth = [_arrays(target, "difficult") for target in targets]
    return np.array([average_precision(*curve) for curve in _match(arrays, truth, num_classes, iou_threshold=0.5)])


def average_precision(correct: np.ndarray, positives: int, eleven_point: bool = False) -> float:
    """Return the average precision of a ranking, a fraction, or NaN without positives.

    Args:
        correct: bool `(M,)`, True for correct detections, best score first.
        positives: number of objects.
        eleven_point: mean of the best precision at the recalls 0, 0.1, ... 1 (VOC 2007) instead of the area under the
            precision envelope. Recalls are compared as integers, so 3 of 10 objects reach 0.3.
    """
    if positives == 0:
        return float("nan")
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(hits) + 1)
    # the best precision at this recall or any higher one; 0 beyond the last recall reached
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if eleven_point:
        return float(np.mean([envelope[np.searchsorted(10 * hits, tenth * positives)] for tenth in range(11)]))
    return float(envelope[:-1][np.asarray(correct, dtype=bool)].sum() / positives)


def _match(
    predictions: Sequence[dict[str, np.ndarray]],
    truth: Sequence[dict[str, np.ndarray]],
    num_classes: int,
    iou_threshold: float,
) -> list[tuple[np.ndarray, int]]:
    """Return the arguments of :func:`average_precision` for each class, by the rules of the VOC devkit.

    Detections are matched by falling score, each with the object of its class and image that it overlaps most
    (Everingham et al., IJCV 2010). It is wrong if the IoU is below the threshold or the object is already matched, and
    ignored if the object is difficult. Boxes are 0-based with exclusive far edges, so the width is `x1 - x0`.
    """
    curves = []
    for label in range(num_classes):
        scores, correct, positives = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
        for detections, objects in zip(predictions, truth, strict=True):
            detected, present = detections["labels"] == label, objects["labels"] == label
            if not (detected.any() or present.any()):
                continue
            difficult = objects["difficult"][present]
            positives += int((~difficult).sum())
            order = np.argsort(-detections["scores"][detected], kind="stable")
            boxes = detections["boxes"][detected][order]
            match = _match_image(boxes, objects["boxes"][present], difficult, iou_threshold)
            scores.append(detections["scores"][detected][order][match >= 0])
            correct.append(match[match >= 0] == 1)
        ranking = np.argsort(-np.concatenate(scores), kind="stable")
        curves.append((np.concatenate(correct)[ranking], positives))
    return curves


def _match_image(boxes: np.ndarray, objects: np.ndarray, difficult: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Match the detections of one class in one image, best score first: 1 is correct, 0 wrong, -1 ignored."""
    matches = np.zeros(len(boxes), dtype=np.int64)
    if not len(objects):
        return matches
    overlaps = _iou(boxes, objects)
    taken = np.zeros(len(objects), dtype=bool)
    for index, best in enumerate(overlaps.argmax(axis=1)):
        if overlaps[index, best] < iou_threshold:
            continue
        matches[index] = -1 if difficult[best] else not taken[best]
        taken[best] = True
    return matches


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersection over union `(M, N)` of boxes `(M, 4)` and `(N, 4)`."""
    sides = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])).clip(min=0)
    shared = sides.prod(axis=2)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _arrays(record: Mapping[str, Any], extra: str) -> dict[str, np.ndarray]:
    """Return boxes, labels and scores or flags of an image as arrays on the CPU."""
    kinds = {
        "boxes": torch.float64,
        "labels": torch.int64,
        extra: torch.bool if extra == "difficult" else torch.float64,
    }
    arrays = {}
    for key, kind in kinds.items():
        value = torch.as_tensor(record[key]).detach().to("cpu", kind).numpy()
        arrays[key] = value.reshape((-1, 4) if key == "boxes" else -1)
    if len({len(value) for value in arrays.values()}) > 1:
        sizes = ", ".join(f"{len(value)} {key}" for key, value in arrays.items())
        raise BisslZooError(f"Detection evaluation: {sizes} in one image; their numbers must be equal.")
    return arrays


def _coco_precision(
    predictions: Sequence[dict[str, np.ndarray]], truth: Sequence[dict[str, np.ndarray]], num_classes: int
) -> np.ndarray:
    """Return COCO's precision `(10 IoU thresholds, 101 recalls, K)`; -1 for a class without objects.

    pycocotools ignores only crowds, and measures the overlap with a crowd relative to the detection. A difficult object
    must be ignored like a crowd, but matched by IoU like any other object.
    """
    from pycocotools.cocoeval import COCOeval, maskUtils  # not needed to load a model

    class Evaluation(COCOeval):
        def computeIoU(self, imgId: int, catId: int) -> Any:
            objects, detections = self._gts[imgId, catId], self._dts[imgId, catId]
            if not objects or not detections:
                return []
            order = np.argsort([-d["score"] for d in detections], kind="stable")[: self.params.maxDets[-1]]
            boxes = [detections[i]["bbox"] for i in order]
            return maskUtils.iou(boxes, [o["bbox"] for o in objects], [0] * len(objects))

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its results
        evaluation = Evaluation(_coco_set(truth, num_classes), _coco_set(predictions, num_classes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


def _coco_set(records: Sequence[dict[str, np.ndarray]], num_classes: int) -> Any:
    """Return objects or detections as pycocotools has them."""
    from pycocotools.coco import COCO

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
