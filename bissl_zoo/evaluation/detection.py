"""Average precision of detections, as Pascal VOC and COCO define it."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.errors import BisslZooError, DatasetError


class DetectionEvaluator:
    """Detection metrics as fractions in [0, 1], over the whole set.

    `AP` (mean over IoU 0.50:0.95), `AP50`, `AP75` and `AP50/<class>`: COCO, through pycocotools, 101 recall points, at
    most 100 detections per image and class. `voc_AP50`: area under the precision envelope (VOC 2010 and later);
    `voc07_AP50`: mean precision at the 11 recalls 0, 0.1, ... 1 (VOC 2007). Means run over the classes with objects.
    Objects marked `difficult` are neither right nor wrong: they need not be found, and detections of them, however
    many, do not count.

    Args:
        classes: the K class names, in the order of the labels.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Forget what was processed."""
        self._records: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}

    def process(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Take in one batch; an image that was processed before is replaced.

        Args:
            predictions: per image `boxes` (M, 4) as x0, y0, x1, y1, `scores` (M,) and `labels` (M,).
            targets: per image `boxes` (N, 4), `labels` (N,), `difficult` (N,) and `image_id`.

        Raises:
            BisslZooError: different numbers of both, a label outside the classes, or a number that is not finite.
        """
        if len(predictions) != len(targets):
            raise BisslZooError(f"Detection evaluation: {len(predictions)} predictions for {len(targets)} images.")
        for prediction, target in zip(predictions, targets, strict=True):
            image_id = int(target["image_id"])
            found, truth = _arrays(prediction, "scores"), _arrays(target, "difficult")
            if not (np.isfinite(found["boxes"]).all() and np.isfinite(found["scores"]).all()):
                raise BisslZooError(
                    f"Detection evaluation, image {image_id}: a predicted box or score is NaN or infinite; "
                    "the model has diverged."
                )
            for what, labels in (("predicted", found["labels"]), ("true", truth["labels"])):
                if labels.size and not 0 <= labels.min() <= labels.max() < len(self.classes):
                    raise BisslZooError(
                        f"Detection evaluation, image {image_id}: {what} labels range from {labels.min()} to "
                        f"{labels.max()}, but there are {len(self.classes)} classes, counted from 0."
                    )
            self._records[image_id] = (found, truth)

    def synchronize(self) -> None:
        """Bring together the images of all ranks; call it on every rank. Images that several ranks saw count once."""
        self._records = {
            image_id: pair for part in all_gather_objects(self._records) for image_id, pair in part.items()
        }

    def evaluate(self) -> dict[str, float]:
        """The metrics of the images processed since `reset`.

        Raises:
            DatasetError: where there were no images, or no objects that count in them.
        """
        figures = self.per_class()
        metrics = {name: fmean(one[name] for one in figures.values()) for name in next(iter(figures.values()))}
        return metrics | {f"AP50/{name}": one["AP50"] for name, one in figures.items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """All figures by class, of those with objects that count: `{"cat": {"AP": 0.4, "AP50": 0.7, ...}}`.

        Raises:
            DatasetError: where there were no images, or no objects that count in them.
        """
        rankings = self.rankings()
        precision = _coco_precision(*self._images(), len(self.classes)).mean(axis=1)  # (10 IoUs, K)
        return {
            name: {
                "AP": float(by_iou.mean()),
                "AP50": float(by_iou[0]),
                "AP75": float(by_iou[5]),
                "voc_AP50": average_precision(*rankings[name]),
                "voc07_AP50": average_precision(*rankings[name], eleven_point=True),
            }
            for name, by_iou in zip(self.classes, precision.T, strict=True)
            if name in rankings
        }

    def rankings(self) -> dict[str, tuple[np.ndarray, int]]:
        """By class, of those with objects that count: its detections, bool (M,), and the number of its objects.

        Whether each detection that counts is right at an IoU of 0.5, the best score first, as
        :func:`average_precision` takes it.

        Raises:
            DatasetError: where there were no images, or no objects that count in them.
        """
        found, truth = self._images()
        if all(one["difficult"].all() for one in truth):
            raise DatasetError(
                f"Detection evaluation: the {len(truth)} images hold no objects, or only difficult ones; "
                "average precision is not defined."
            )
        curves = _match(found, truth, len(self.classes), iou_threshold=0.5)
        return {name: curve for name, curve in zip(self.classes, curves, strict=True) if curve[1]}

    def _images(self) -> tuple[tuple[dict[str, np.ndarray], ...], tuple[dict[str, np.ndarray], ...]]:
        """Predictions and targets by image number, so that ties do not depend on how images were shared out."""
        if not self._records:
            raise DatasetError("Detection evaluation: no image was processed. Is the test set empty?")
        found, truth = zip(*(self._records[image_id] for image_id in sorted(self._records)), strict=True)
        return found, truth


def voc_average_precision(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    num_classes: int,
    iou_threshold: float = 0.5,
    eleven_point: bool = False,
) -> np.ndarray:
    """Average precision per class by the rules of the VOC devkit (Everingham et al., IJCV 2010).

    Detections of a class are taken by falling score, equal ones in the order given. Each looks at the object of its
    class and image that it overlaps most: an IoU below the threshold is wrong (the devkit accepts the threshold itself,
    some other evaluators do not), a difficult object does not count, one that was found before is wrong.
    Boxes are 0-based with the far edges outside, so that no pixel is added to a width.

    Args:
        predictions: per image `boxes` (M, 4), `scores` (M,), `labels` (M,); arrays or tensors.
        targets: per image `boxes` (N, 4), `labels` (N,) and `difficult` (N,).

    Returns:
        float64 (K,); NaN for a class without objects that count.
    """
    found = [_arrays(prediction, "scores") for prediction in predictions]
    truth = [_arrays(target, "difficult") for target in targets]
    curves = _match(found, truth, num_classes, iou_threshold)
    return np.array([average_precision(right, positives, eleven_point) for right, positives in curves])


def average_precision(right: np.ndarray, positives: int, eleven_point: bool = False) -> float:
    """Average precision of a ranking.

    Args:
        right: bool (M,), whether each detection is right, best score first.
        positives: how many there are to find.
        eleven_point: mean of the best precision at recalls 0, 0.1, ... 1 (VOC 2007) instead of the area under the
            precision envelope. Recalls are compared as whole numbers, so that 3 of 10 does reach 0.3.

    Returns:
        A fraction; NaN where there is nothing to find.
    """
    if positives == 0:
        return float("nan")
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    # The best precision at this recall or any higher one; beyond the last recall reached it is 0.
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if eleven_point:
        return float(np.mean([envelope[np.searchsorted(10 * hits, tenth * positives)] for tenth in range(11)]))
    return float(envelope[:-1][np.asarray(right, dtype=bool)].sum() / positives)


def _match(
    found: Sequence[dict[str, np.ndarray]],
    truth: Sequence[dict[str, np.ndarray]],
    num_classes: int,
    iou_threshold: float,
) -> list[tuple[np.ndarray, int]]:
    """Per class, whether each detection that counts is right (best score first), and the number of objects."""
    curves = []
    for label in range(num_classes):
        scores, right, positives = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
        for detections, objects in zip(found, truth, strict=True):
            mine, theirs = detections["labels"] == label, objects["labels"] == label
            if not (mine.any() or theirs.any()):
                continue
            difficult = objects["difficult"][theirs]
            positives += int((~difficult).sum())
            order = np.argsort(-detections["scores"][mine], kind="stable")
            verdict = _verdicts(detections["boxes"][mine][order], objects["boxes"][theirs], difficult, iou_threshold)
            scores.append(detections["scores"][mine][order][verdict >= 0])
            right.append(verdict[verdict >= 0] == 1)
        ranking = np.argsort(-np.concatenate(scores), kind="stable")
        curves.append((np.concatenate(right)[ranking], positives))
    return curves


def _verdicts(boxes: np.ndarray, objects: np.ndarray, difficult: np.ndarray, iou_threshold: float) -> np.ndarray:
    """For the detections of one class in one image, best score first: 1 right, 0 wrong, -1 does not count."""
    verdicts = np.zeros(len(boxes), dtype=np.int64)
    if not len(objects):
        return verdicts
    overlaps = _iou(boxes, objects)
    taken = np.zeros(len(objects), dtype=bool)
    for index, best in enumerate(overlaps.argmax(axis=1)):
        if overlaps[index, best] < iou_threshold:
            continue
        verdicts[index] = -1 if difficult[best] else not taken[best]
        taken[best] = True
    return verdicts


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (M, 4) and (N, 4), (M, N)."""
    sides = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])).clip(min=0)
    shared = sides.prod(axis=2)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class _COCOeval(COCOeval):
    """COCO evaluation in which crowds are VOC's difficult objects.

    pycocotools ignores an object only where it is a crowd, and measures the overlap with a crowd as a share of the
    detection. A difficult object is to be ignored like a crowd, but found by IoU like any other.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        objects, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        if not objects or not detections:
            return []
        order = np.argsort([-one["score"] for one in detections], kind="stable")[: self.params.maxDets[-1]]
        return coco_mask.iou(
            [detections[i]["bbox"] for i in order], [one["bbox"] for one in objects], [0] * len(objects)
        )


def _coco_precision(
    found: Sequence[dict[str, np.ndarray]], truth: Sequence[dict[str, np.ndarray]], num_classes: int
) -> np.ndarray:
    """COCO's precision at (10 IoU thresholds, 101 recalls, K classes); -1 for a class without objects that count."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports by printing
        evaluation = _COCOeval(_coco_set(truth, num_classes), _coco_set(found, num_classes), "bbox")
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
                "id": len(annotations) + 1,  # pycocotools takes 0 for "not matched"
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


def _arrays(record: Mapping[str, Any], extra: str) -> dict[str, np.ndarray]:
    """One image's boxes, labels and scores or flags as arrays on the CPU."""
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
        raise BisslZooError(f"Detection evaluation: {sizes} in one image; there must be as many of each.")
    return arrays
