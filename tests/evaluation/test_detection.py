from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation.detection import DetectionEvaluator, average_precision

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ONE = pytest.approx(1.0, rel=1e-12)  # pycocotools adds a rounding unit to a denominator
BOX, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def target(boxes, labels=None, difficult=None, image_id=0):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        "difficult": torch.tensor(difficult if difficult is not None else [False] * len(boxes), dtype=torch.bool),
        "image_id": image_id,
    }


def prediction(boxes, scores, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "labels": torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
    }


def evaluate(predictions, targets, classes=("thing",)):
    evaluator = DetectionEvaluator(classes)
    evaluator.process(predictions, targets)
    return evaluator.evaluate()


def golden_set():
    """92 detections of 75 objects in 4 classes, numbered from 1 there."""
    data = np.load(GOLDEN / "det_ap50_clean.npz")
    targets, predictions = [], []
    for image in range(int(data["n_images"])):
        mine, found = data["gt_image"] == image, data["pred_image"] == image
        targets.append(target(data["gt_boxes"][mine].tolist(), (data["gt_labels"][mine] - 1).tolist(), image_id=image))
        predictions.append(
            prediction(
                data["pred_boxes"][found].tolist(),
                data["pred_scores"][found].tolist(),
                (data["pred_labels"][found] - 1).tolist(),
            )
        )
    return data, predictions, targets


def test_golden_set_gives_the_values_of_independent_implementations():
    data, predictions, targets = golden_set()
    metrics = evaluate(predictions, targets, list("abcd"))
    # Counts and divisions in float64 on both sides.
    assert metrics["AP50"] == pytest.approx(float(data["ap50_coco"]) / 100, rel=1e-9)
    assert metrics["voc_AP50"] == pytest.approx(float(data["ap50_voc_allpoint_own"]) / 100, rel=1e-9)
    # A matching that ignores the labels gives another number; ours must not be that one.
    assert abs(metrics["AP50"] - float(data["ap50_reference"]) / 100) > 0.01


def random_detections(images=12, classes=3, seed=0):
    """Overlapping objects, and detections that are moved copies of them, one or two of each, with equal scores."""
    generator = np.random.default_rng(seed)
    predictions, targets = [], []
    for image in range(images):
        count = int(generator.integers(0, 6))
        corners = generator.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + generator.uniform(8, 40, (count, 2))], axis=1)
        labels = generator.integers(0, classes, count)
        again = generator.integers(0, count, count + 3) if count else np.zeros(0, dtype=np.int64)
        found = np.concatenate([boxes, boxes[again]]) + generator.normal(0, 2.5, (count + len(again), 4))
        scores = generator.integers(1, 12, len(found)) / 16
        targets.append(target(boxes.tolist(), labels.tolist(), image_id=image))
        predictions.append(prediction(found.tolist(), scores.tolist(), [*labels.tolist(), *labels[again].tolist()]))
    return predictions, targets


def coco_objects(records, scored):
    annotations = []
    for image, record in enumerate(records):
        boxes = record["boxes"].double()
        for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": int(record["labels"][i]), "iscrowd": 0}
            one |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            annotations.append(one | ({"score": float(record["scores"][i])} if scored else {}))
    return annotations


def test_metrics_equal_those_of_pycocotools(capsys):
    predictions, targets = random_detections()
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(12)], "categories": [{"id": i} for i in range(3)]}
    coco.dataset["annotations"] = coco_objects(targets, scored=False)
    coco.createIndex()
    reference = COCOeval(coco, coco.loadRes(coco_objects(predictions, scored=True)), "bbox")
    reference.evaluate(), reference.accumulate(), reference.summarize()
    metrics = evaluate(predictions, targets, list("abc"))
    assert 0.2 < metrics["AP"] < 0.8
    for name, value in zip(("AP", "AP50", "AP75"), reference.stats, strict=False):
        assert metrics[name] == pytest.approx(value, rel=1e-12)
    by_class = reference.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    evaluator = DetectionEvaluator("abc")
    evaluator.process(predictions, targets)
    assert [one["AP"] for one in evaluator.per_class().values()] == pytest.approx(by_class, rel=1e-12)
    assert capsys.readouterr().err == ""


def test_area_and_eleven_points_of_a_ranking_worked_out_by_hand():
    # Recall 1/3, 1/3, 2/3, precision 1, 1/2, 2/3: area 1/3 + 2/3 * 1/3; best precision 1 at 4 recalls, 2/3 at 3.
    ranking = np.array([True, False, True])
    assert average_precision(ranking, 3) == pytest.approx(5 / 9, rel=1e-15)
    assert average_precision(ranking, 3, eleven_point=True) == pytest.approx((4 + 3 * 2 / 3) / 11, rel=1e-15)


def test_area_agrees_with_the_devkit_formula_on_random_rankings():
    generator = np.random.default_rng(0)
    for _ in range(50):
        right = generator.random(30) < 0.4
        positives = int(right.sum()) + 3
        recall, precision = np.cumsum(right) / positives, np.cumsum(right) / np.arange(1, 31)
        recall, precision = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
        for i in range(len(precision) - 2, -1, -1):
            precision[i] = max(precision[i], precision[i + 1])
        area = sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)))
        assert average_precision(right, positives) == pytest.approx(area, rel=1e-12)


def precise():
    """Two detections with scores that are equal in float32, the right one with the higher score."""
    found = prediction([FAR, BOX], [0.5, 0.5])
    return found | {"scores": torch.tensor([0.5, 0.5 + 1e-15], dtype=torch.float64)}


SMALL, LARGE = [100, 100, 110, 110], [100, 100, 200, 200]
TIED = [
    (prediction([FAR], [0.5]), target([BOX], image_id=1)),
    (prediction([BOX], [0.5]), target([BOX], image_id=0)),
]
#: predictions, targets, voc_AP50, and AP50 where the definitions agree
CASES = {
    "a second detection of an object is wrong": (
        *([prediction([BOX, BOX, FAR], [0.9, 0.8, 0.7])], [target([BOX, FAR])]),
        *(1 / 2 + 2 / 3 / 2, None),
    ),
    "an overlap of exactly the threshold is right": ([prediction([[0, 0, 10, 5]], [0.9])], [target([BOX])], 1.0, 1.0),
    "an overlap below the threshold is wrong": ([prediction([[0, 0, 10, 4.99]], [0.9])], [target([BOX])], 0.0, 0.0),
    # it lies inside the difficult object but covers a hundredth of it
    "a difficult object is matched by IoU": (
        *([prediction([BOX, SMALL], [0.5, 0.9])], [target([BOX, LARGE], difficult=[False, True])]),
        *(0.5, 0.5),
    ),
    # both overlap the first object most (1 and 0.82); the second also overlaps the other one by 0.67
    "only the object overlapped most counts in VOC": (
        *([prediction([BOX, [0, 1, 10, 10.9]], [0.9, 0.8])], [target([BOX, [0, 2, 10, 12]])]),
        *(0.5, None),
    ),
    "label and image must agree": (
        [prediction([BOX], [0.9], [1]), prediction([BOX], [0.9], [0])],
        [target([BOX], [0], image_id=0), target([BOX], [1], image_id=1)],
        *(0.0, 0.0),
    ),
    # the right one, in image 0, comes first: precision 1 at recall 1/2
    "equal scores rank by image number": (*zip(*TIED, strict=True), 0.5, None),
    "equal scores rank by image number, reversed": (*zip(*TIED[::-1], strict=True), 0.5, None),
    "scores are ranked in full precision": ([precise()], [target([BOX])], 1.0, 1.0),
    "a class without objects is not in the mean": (
        [prediction([BOX, FAR], [0.9, 0.8], [0, 1])],
        [target([BOX])],
        1.0,
        1.0,
    ),
    "an image without objects counts its false detections": (
        [prediction([BOX], [0.5]), prediction([BOX], [0.9])],
        [target([BOX], image_id=0), target([], image_id=1)],
        *(0.5, 0.5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_of_matching_and_ranking(case):
    predictions, targets, voc, coco = CASES[case]
    metrics = evaluate(predictions, targets, ["a", "b"])
    assert metrics["voc_AP50"] == pytest.approx(voc, rel=1e-12)
    assert coco is None or metrics["AP50"] == pytest.approx(coco, rel=1e-9)


def test_metrics_by_class_by_class_worked_out_by_hand():
    # a: found, with an IoU of 0.6; b: one of two, after a wrong one; c: never; d: nowhere; e: difficult only
    targets = [
        target([BOX, FAR], [0, 1], image_id=0),
        target([BOX, FAR, [80, 80, 90, 90]], [1, 2, 4], [False, False, True], image_id=1),
    ]
    predictions = [
        prediction([[0, 0, 10, 6], BOX, FAR], [0.9, 0.8, 0.7], [0, 1, 1]),
        prediction([BOX, [80, 80, 90, 90]], [0.9, 0.9], [3, 4]),
    ]
    evaluator = DetectionEvaluator("abcde")
    evaluator.process(predictions, targets)
    metrics_by_class = evaluator.per_class()
    assert list(metrics_by_class) == ["a", "b", "c"]
    # 0.6 is reached at the thresholds 0.5, 0.55 and 0.6
    expected = {"AP": 0.3, "AP50": 1.0, "AP75": 0.0, "voc_AP50": 1.0, "voc07_AP50": 1.0}
    assert metrics_by_class["a"] == pytest.approx(expected, rel=1e-9)
    # precision 1/2 up to recall 1/2: at 51 of COCO's 101 recalls, and 6 of the 11
    expected = {"AP": 51 / 202, "AP50": 51 / 202, "AP75": 51 / 202, "voc_AP50": 1 / 4, "voc07_AP50": 3 / 11}
    assert metrics_by_class["b"] == pytest.approx(expected, rel=1e-9)
    assert set(metrics_by_class["c"].values()) == {0.0}
    metrics = evaluator.evaluate()
    for name in expected:
        assert metrics[name] == pytest.approx(sum(one[name] for one in metrics_by_class.values()) / 3, rel=1e-12)
    assert {name for name in metrics if "/" in name} == {"AP50/a", "AP50/b", "AP50/c"}


@pytest.mark.parametrize("targets", [[target([])], [target([BOX], difficult=[True])]])
def test_a_set_without_objects_is_an_error(targets):
    with pytest.raises(DatasetError, match="no objects, or only difficult ones"):
        evaluate([prediction([BOX], [0.9])], targets)


def test_an_empty_set_is_an_error():
    evaluator = DetectionEvaluator(["a"])
    with pytest.raises(DatasetError, match="no image was processed"):
        evaluator.evaluate()
    evaluator.process([prediction([BOX], [0.9])], [target([BOX])])
    evaluator.reset()
    with pytest.raises(DatasetError, match="no image was processed"):
        evaluator.evaluate()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([prediction([BOX], [float("nan")])], "image 0: a predicted box or score is NaN"),
        ([prediction([BOX], [0.9], [1])], "image 0: predicted labels range from 1 to 1, but there are 1 classes"),
        ([prediction([BOX], [0.9, 0.8])], "1 boxes, 1 labels, 2 scores"),
        ([], "0 predictions for 1 images"),
    ],
)
def test_invalid_predictions_are_refused(found, message):
    with pytest.raises(BisslZooError, match=message):
        DetectionEvaluator(["a"]).process(found, [target([BOX])])
