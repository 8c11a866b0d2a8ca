from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation import DetectionEvaluator, average_precision, voc_average_precision

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


def test_area_and_pycocotools_agree_where_their_definitions_meet():
    # A hundred objects far apart, found in any order among wrong detections: at the recalls 1/100, 2/100, ... COCO
    # takes the precision of the same ranking, and once more that of the first at recall 0.
    generator = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(10), np.arange(10)), axis=-1).reshape(-1, 2) * 50.0
    boxes = np.concatenate([corners, corners + 20], axis=1)
    wrong = boxes[:60] + 25
    scores = np.concatenate([[1.0], generator.uniform(0, 0.9, 159)])
    targets, predictions = [], []
    for image in range(4):  # COCO takes a hundred detections of an image
        mine, others = boxes[image::4], wrong[image::4]
        targets.append(target(mine.tolist(), image_id=image))
        mine_scores = [*scores[:100][image::4], *scores[100:][image::4]]
        predictions.append(prediction([*mine.tolist(), *others.tolist()], mine_scores))
    metrics = evaluate(predictions, targets)
    assert 0.6 < metrics["voc_AP50"] < 0.95
    # a few of its hundredths are above the recall by rounding, and then it takes the next
    assert metrics["AP50"] == pytest.approx((1 + 100 * metrics["voc_AP50"]) / 101, abs=2e-3)


def test_eleven_point_mean_agrees_with_an_independent_implementation():
    data = np.load(GOLDEN / "map11_a.npz")
    values = []
    for scores, positive in zip(data["scores"].T, data["targets"].T > 0, strict=True):
        values.append(
            average_precision(positive[np.argsort(-scores, kind="stable")], positive.sum(), eleven_point=True)
        )
    # The reference takes its mean in float32.
    assert np.mean(values) == pytest.approx(float(data["mAP"]) / 100, rel=1e-6)


def test_eleven_point_recalls_are_exact_tenths():
    # Three of ten are found, then only misses: precision 1 at the recalls 0, 0.1, 0.2, 0.3, and 0 beyond.
    assert average_precision(np.array([True] * 3 + [False] * 5), 10, eleven_point=True) == pytest.approx(
        4 / 11, rel=1e-15
    )


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


def test_difficult_object_is_neither_right_nor_wrong():
    targets = [target([BOX, FAR], difficult=[False, True])]
    for found in ([BOX], [BOX, FAR], [BOX, FAR, FAR, FAR]):
        # The detections of the difficult object score highest: counted as wrong they would halve the precision.
        metrics = evaluate([prediction(found, [0.5] + [0.9] * (len(found) - 1))], targets)
        assert all(metrics[name] == ONE for name in ("AP", "AP50", "voc_AP50", "voc07_AP50"))


def test_difficult_object_is_matched_by_iou_and_not_by_the_share_of_the_detection():
    # The second detection lies inside the difficult object but covers a hundredth of it: it is wrong.
    targets = [target([BOX, [100, 100, 200, 200]], difficult=[False, True])]
    metrics = evaluate([prediction([BOX, [100, 100, 110, 110]], [0.5, 0.9])], targets)
    assert metrics["AP50"] == pytest.approx(0.5, rel=1e-9)
    assert metrics["voc_AP50"] == pytest.approx(0.5, rel=1e-9)


def test_second_detection_of_an_object_is_wrong():
    metrics = evaluate([prediction([BOX, BOX, FAR], [0.9, 0.8, 0.7])], [target([BOX, FAR])])
    assert metrics["voc_AP50"] == pytest.approx(1 / 2 + 2 / 3 / 2, rel=1e-15)


def test_overlap_of_exactly_the_threshold_is_right():
    values = voc_average_precision([prediction([[0, 0, 10, 5]], [0.9])], [target([BOX])], num_classes=1)
    assert values.tolist() == [1.0]
    values = voc_average_precision([prediction([[0, 0, 10, 4.99]], [0.9])], [target([BOX])], num_classes=1)
    assert values.tolist() == [0.0]


def test_devkit_rule_looks_only_at_the_object_overlapped_most():
    # Both detections overlap the first object most (1 and 0.82); the second also overlaps the other one by 0.67.
    targets = [target([BOX, [0, 2, 10, 12]])]
    values = voc_average_precision([prediction([BOX, [0, 1, 10, 10.9]], [0.9, 0.8])], targets, num_classes=1)
    assert values.tolist() == [0.5]


def test_label_and_image_must_agree():
    targets = [target([BOX], [0], image_id=0), target([BOX], [1], image_id=1)]
    metrics = evaluate([prediction([BOX], [0.9], [1]), prediction([BOX], [0.9], [0])], targets, ["a", "b"])
    assert metrics["AP50"] == metrics["voc_AP50"] == metrics["AP50/a"] == 0.0


def test_equal_scores_rank_by_image_number_whatever_the_order_of_processing():
    pairs = [
        (prediction([FAR], [0.5]), target([BOX], image_id=1)),
        (prediction([BOX], [0.5]), target([BOX], image_id=0)),
    ]
    for order in (pairs, pairs[::-1]):
        metrics = evaluate(*zip(*order, strict=True))
        # The right one, in image 0, comes first: precision 1 at recall 1/2.
        assert metrics["voc_AP50"] == 0.5


def test_scores_are_ranked_in_full_precision():
    found = prediction([FAR, BOX], [0.5, 0.5])
    found["scores"] = torch.tensor([0.5, 0.5 + 1e-15], dtype=torch.float64)  # equal in float32
    metrics = evaluate([found], [target([BOX])])
    assert metrics["voc_AP50"] == 1.0 and metrics["AP50"] == ONE


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


def test_class_without_objects_is_left_out_of_the_mean():
    metrics = evaluate([prediction([BOX, FAR], [0.9, 0.8], [0, 1])], [target([BOX])], ["a", "b"])
    assert all(metrics[name] == ONE for name in ("AP50", "voc_AP50", "voc07_AP50"))
    assert "AP50/a" in metrics and "AP50/b" not in metrics
    values = voc_average_precision([prediction([BOX], [0.9])], [target([BOX])], num_classes=2)
    assert values[0] == 1.0 and np.isnan(values[1])


def test_image_without_objects_still_counts_its_false_detections():
    targets = [target([BOX], image_id=0), target([], image_id=1)]
    metrics = evaluate([prediction([BOX], [0.5]), prediction([BOX], [0.9])], targets)
    assert metrics["voc_AP50"] == 0.5
    assert metrics["AP50"] == pytest.approx(0.5, rel=1e-9)


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
