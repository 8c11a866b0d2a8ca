from pathlib import Path

import numpy as np
import pytest
import torch

from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation import MultilabelEvaluator

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def evaluator(scores, targets, classes=None):
    scores, targets = torch.as_tensor(scores), torch.as_tensor(targets)
    filled = MultilabelEvaluator(classes or [f"class{i}" for i in range(scores.shape[1])])
    filled.process(scores, targets)
    return filled


def one_class(scores, targets):
    """AP11 and AP of one class."""
    metrics = evaluator(torch.tensor(scores)[:, None], torch.tensor(targets)[:, None]).per_class()
    return metrics["class0"]["AP11"], metrics["class0"]["AP"]


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    return data["scores"], data["targets"], float(data["mAP"]) / 100


def eleven_points(positive):
    """The devkit's loop over a ranking, with whole numbers for tenths."""
    hits, best = 0, [0.0] * 11
    for place, right in enumerate(positive, start=1):
        hits += bool(right)
        for tenth in range(11):
            if 10 * hits >= tenth * sum(positive):
                best[tenth] = max(best[tenth], hits / place)
    return sum(best) / 11


def random_set(samples=60, classes=5, levels=None, ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(samples, classes, dtype=torch.float64, generator=generator)
    targets = (torch.rand(samples, classes, generator=generator) < 0.3).float()
    targets[torch.rand(samples, classes, generator=generator) < ignored] = -1
    return (scores if levels is None else (scores * levels).floor() / levels), targets


def test_eleven_point_mean_agrees_with_an_independent_implementation():
    scores, targets, expected = golden("map11_a")
    # the reference takes its mean in float32
    assert evaluator(scores, targets).evaluate()["mAP11"] == pytest.approx(expected, rel=1e-6)


def test_equal_scores_are_ranked_in_the_order_of_the_set():
    scores, targets, theirs = golden("map11_ties")  # with numpy's default sort, which is not stable
    columns = [(s, t) for s, t in zip(scores.T, targets.T, strict=True) if t.any()]
    stable = np.mean([eleven_points([t[i] for i in sorted(range(len(s)), key=lambda i: -s[i])]) for s, t in columns])
    least, most = (
        np.mean([eleven_points(t[np.lexsort((sign * t, -s))]) for s, t in columns])  # positives last, first
        for sign in (1, -1)
    )
    ours = evaluator(scores, targets).evaluate()["mAP11"]
    assert ours == pytest.approx(stable, rel=1e-12)
    assert least < theirs < most and abs(ours - theirs) > 1e-3


@pytest.mark.slow  # the import of torchmetrics
@pytest.mark.filterwarnings("ignore:No positive samples found")  # of torchmetrics, on the class without
@pytest.mark.parametrize("levels", [None, 7])
def test_the_area_agrees_with_torchmetrics_over_ties_and_ignored_labels(levels):
    torchmetrics = pytest.importorskip("torchmetrics", reason="the reference for the area needs torchmetrics")
    scores, targets = random_set(levels=levels, ignored=0.2)
    targets[:, 1] = targets[:, 1].clamp(max=0)  # a class without positives
    metrics = evaluator(scores, targets).per_class()
    reference = torchmetrics.classification.MultilabelAveragePrecision(5, average=None, ignore_index=-1)
    # theirs is in float32
    expected = reference(scores, targets.long())
    assert list(metrics) == ["class0", "class2", "class3", "class4"]
    for name, values in metrics.items():
        assert values["AP"] == pytest.approx(expected[int(name[-1])].item(), rel=1e-5)


def test_a_ranking_worked_out_by_hand():
    # precision 1 at recall 1/2 and 2/3 at recall 1: six of the recalls 0, 0.1, ... are up to 1/2
    assert one_class([3.0, 2.0, 1.0], [1, 0, 1]) == pytest.approx(((6 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2), rel=1e-15)


def test_equal_scores_worked_out_by_hand():
    # in the given order precision is 0, 1/2, 2/3, 1/2, of which 2/3 comes last in recall; one threshold takes in all
    assert one_class([0.5] * 4, [0, 1, 1, 0]) == pytest.approx((2 / 3, 1 / 2), rel=1e-15)


def test_recalls_are_exact_tenths():
    # three of ten are found first and the others after a thousand misses: precision 1 at 0, 0.1, 0.2 and 0.3
    scores = [float(-place) for place in range(1010)]
    eleven, _ = one_class(scores, [1] * 3 + [0] * 1000 + [1] * 7)
    late = [(3 + hit) / (1003 + hit) for hit in range(1, 8)]
    assert eleven == pytest.approx((4 + sum(max(late[i:]) for i in range(7))) / 11, rel=1e-12)


def test_an_ignored_label_removes_its_image_from_that_class_only():
    scores, targets = random_set(ignored=0.3)
    metrics = evaluator(scores, targets).per_class()
    for column, values in enumerate(metrics.values()):
        counts = targets[:, column] >= 0
        assert 0 < counts.sum() < 60
        assert (values["AP11"], values["AP"]) == one_class(
            scores[counts, column].tolist(), targets[counts, column].tolist()
        )


def test_classes_without_positives_are_left_out_of_the_mean():
    # a perfect class, one that is nowhere, one of which nothing is known, and one that is found second
    scores = torch.tensor([[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    filled = evaluator(scores, torch.tensor([[1, 0, -1, 0], [0, 0, -1, 1]]), list("abcd"))
    assert filled.per_class() == {"a": {"AP11": 1.0, "AP": 1.0}, "d": {"AP11": 0.5, "AP": 0.5}}
    assert filled.evaluate() == {"mAP11": 0.75, "mAP": 0.75}


def test_an_empty_set_or_one_without_positives_is_an_error():
    empty = MultilabelEvaluator(["a", "b"])
    with pytest.raises(DatasetError, match="no sample was processed"):
        empty.evaluate()
    empty.process(torch.zeros(3, 2), torch.tensor([[0, -1], [0, 0], [-1, -1]]))
    with pytest.raises(DatasetError, match="none of the 3 samples has a class"):
        empty.evaluate()
    empty.process(torch.zeros(1, 2), torch.ones(1, 2))
    assert empty.evaluate()
    empty.reset()
    with pytest.raises(DatasetError, match="no sample was processed"):
        empty.evaluate()


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 3), r"of 2 classes: predictions have shape \(1, 3\)"),
        (torch.zeros(2, 2), torch.zeros(1, 2), r"targets \(1, 2\); expected \(B, 2\)"),
        (torch.full((1, 2), float("nan")), torch.zeros(1, 2), "NaN or infinite"),
        (torch.zeros(1, 2), torch.tensor([[0.5, 2.0]]), r"targets are \[0.5, 2.0\]"),
    ],
)
def test_invalid_scores_and_targets_are_refused(scores, targets, message):
    with pytest.raises(BisslZooError, match=message):
        MultilabelEvaluator(["a", "b"]).process(scores, targets)
