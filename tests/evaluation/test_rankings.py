"""Rankings of the evaluators, computed by hand, and the average precision that follows from them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve

from bissl_zoo.evaluation import DetectionEvaluator, MultilabelEvaluator, TopKEvaluator
from bissl_zoo.evaluation.classification import MOST_RANKED, order_of_set, ranking

BOX, FAR, OUT = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0], [80.0, 80.0, 90.0, 90.0]


def as_lists(rankings):
    """Rankings as lists."""
    return {name: (right.tolist(), positives) for name, (right, positives) in rankings.items()}


def steps(right, positives):
    """The area under the steps of precision over recall."""
    return sum(sum(right[: n + 1]) / (n + 1) for n, one in enumerate(right) if one) / positives


def detections(*images):
    """An evaluator that has seen images of `(found, truth)`: boxes with label and score, or label and difficult."""
    evaluator = DetectionEvaluator(["a", "b", "c"])
    for number, (found, truth) in enumerate(images):
        boxes, labels, scores = zip(*found, strict=True) if found else ([], [], [])
        objects, classes, difficult = zip(*truth, strict=True) if truth else ([], [], [])
        evaluator.process(
            [{"boxes": boxes, "labels": labels, "scores": scores}],
            [{"boxes": objects, "labels": classes, "difficult": difficult, "image_id": number}],
        )
    return evaluator


def test_detections_are_ranked_over_all_images_and_a_second_match_is_wrong():
    evaluator = detections(
        ([(BOX, 0, 0.5), (BOX, 0, 0.9), (OUT, 0, 0.7)], [(BOX, 0, False), (FAR, 0, False)]),
        ([(FAR, 0, 0.8), (BOX, 1, 0.6)], [(FAR, 0, False), (BOX, 1, False)]),
    )
    # 0.9 finds the first object, 0.8 that of the second image, 0.7 none, 0.5 the first object again
    assert as_lists(evaluator.rankings()) == {"a": ([True, True, False, False], 3), "b": ([True], 1)}


def test_several_labels_rank_without_ignored_images_and_equal_scores_as_in_the_set():
    evaluator = MultilabelEvaluator(["a", "b", "c"])
    evaluator.process(
        torch.tensor([[0.2, 0.5, 0.1], [0.9, 0.5, 0.2], [0.4, 0.5, 0.3], [0.6, 0.7, 0.4]]),
        torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, -1], [-1, 0, 0]]),
    )
    # a: the images 1, 2, 0; b: 3, then 0, 1, 2, which are equal; c is nowhere
    assert as_lists(evaluator.rankings()) == {"a": ([False, True, True], 2), "b": ([False, False, True, True], 2)}


def test_single_labels_rank_each_class_against_the_rest_by_softmax():
    evaluator = TopKEvaluator(["a", "b", "c"])
    # as logits 3 of image 0 is the most; as a share of its image that of image 1 is
    evaluator.process(torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([1]))
    evaluator.process(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    assert as_lists(evaluator.rankings()) == {"a": ([True, False, False], 1), "b": ([True, True, False], 2)}
    evaluator.reset()
    assert evaluator.rankings() == {}


def test_curves_of_single_labels_are_scikit_learns_on_the_same_predictions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (300,), generator=generator)
    logits = torch.randn(300, 6, generator=generator) + 1.5 * torch.eye(6)[labels]
    evaluator = TopKEvaluator([f"class{n}" for n in range(6)])
    for start in range(0, 300, 64):
        evaluator.process(logits[start : start + 64], labels[start : start + 64])
    rankings = as_lists(evaluator.rankings())
    assert list(rankings) == [f"class{n}" for n in range(5)]  # the last has no sample
    shares = logits.double().softmax(dim=1).numpy()
    for label, (right, positives) in enumerate(rankings.values()):
        mine = (labels == label).numpy()
        assert positives == mine.sum() and len(right) == 300
        assert steps(right, positives) == pytest.approx(average_precision_score(mine, shares[:, label]), rel=1e-12)
        precision, recall, _ = precision_recall_curve(mine, shares[:, label])
        hits = np.cumsum(right)
        assert precision[-2::-1] == pytest.approx(hits / np.arange(1, 301), rel=1e-12)  # theirs ends at recall 0
        assert recall[-2::-1] == pytest.approx(hits / positives, rel=1e-12)


def test_above_two_hundred_classes_no_scores_are_kept():
    for classes, kept in ((MOST_RANKED, True), (MOST_RANKED + 1, False)):
        evaluator = TopKEvaluator([str(n) for n in range(classes)])
        evaluator.process(torch.eye(classes)[:3], torch.arange(3))
        evaluator.synchronize()
        assert sum(map(torch.Tensor.numel, evaluator._scores)) == (3 * classes if kept else 0)
        assert list(evaluator.rankings()) == (["0", "1", "2"] if kept else [])
        assert evaluator.evaluate()["top1"] == 1.0 and evaluator.confusion().trace() == 3


def test_the_order_of_the_set_is_that_before_it_was_shared_out():
    for samples in (0, 1, 7):
        parts = [list(range(samples))[rank::3] for rank in range(3)]
        shared = torch.tensor([sample for part in parts for sample in part], dtype=torch.int64)
        assert shared[order_of_set([len(part) for part in parts])].tolist() == list(range(samples))
    assert ranking(torch.zeros(3), torch.tensor([False, True, True]))[0].tolist() == [False, True, True]
