"""Metrics by class that a run keeps: from the evaluators, written and read back."""

import numpy as np
import pytest
import torch

from bissl_zoo.engine.evaluate import (
    DETAILS_FILE,
    Details,
    details_of,
    precision_at_recalls,
    read_details,
    write_details,
)
from bissl_zoo.errors import CheckpointError
from bissl_zoo.evaluation import DetectionEvaluator, MultilabelEvaluator, TopKEvaluator


@pytest.mark.parametrize(
    "content",
    ["[]", '{"a": 1}', '{"a": {"per_class": {"x": 1}}}', '{"a": {"per_class": {"x": {"AP": 2}}}}',
     '{"a": {"classes": ["x"], "confusion": [[1, 2]]}}', '{"a": {"classes": ["x"], "confusion": [["1"]]}}',
     '{"a": {"classes": [1], "confusion": [[1]]}}', '{"a": {"curves": {"x": [0.5]}}}', "{", "[" * 9999,
     '{"a": {"seconds": -1}}', '{"a": {"seconds": "1"}}', '{"a": {"seconds": NaN}}', '{"a": {"seconds": 1e300}}'],
)  # fmt: skip
def test_a_file_with_other_contents_is_refused(tmp_path, content):
    (tmp_path / DETAILS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=DETAILS_FILE):
        read_details(tmp_path)


def test_details_are_those_of_the_evaluator():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    evaluator = TopKEvaluator(["a", "b", "c"], topk=(1,))
    evaluator.process(scores, targets)
    details = details_of(evaluator)
    assert details.confusion == evaluator.confusion().tolist() and sum(map(sum, details.confusion)) == 40
    assert details.per_class == evaluator.per_class() and details.seconds == 0
    assert details.curves == {name: precision_at_recalls(*one) for name, one in evaluator.rankings().items()}
    assert list(details.curves) == ["a", "b", "c"]


def test_precision_over_recall_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    right, scores = generator.random(60) < 0.4, generator.random(60)
    curve = precision_at_recalls(right[np.argsort(-scores)], int(right.sum()))
    precision, recall, _ = sklearn.precision_recall_curve(right, scores)
    # scikit-learn's last point has no threshold; 1e-9 is room for recalls that are hit exactly
    expected = [max(precision[:-1][recall[:-1] >= point / 100 - 1e-9], default=0.0) for point in range(101)]
    assert curve == pytest.approx(expected, abs=1e-5)
    assert precision_at_recalls(np.array([True, False]), 2)[50:52] == [1.0, 0.0]


def test_curves_of_detections_and_of_several_labels():
    box, far = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    evaluator = DetectionEvaluator(["x", "y"])
    truth = {"boxes": [box, far], "labels": [0, 0], "difficult": [False, False], "image_id": 1}
    found = {"boxes": [box, [80.0, 80, 90, 90], far], "labels": [0, 0, 0], "scores": [0.9, 0.8, 0.7]}
    evaluator.process([found], [truth])
    curve = details_of(evaluator).curves
    assert list(curve) == ["x"] and curve["x"][:51] == [1.0] * 51 and curve["x"][51:] == [round(2 / 3, 5)] * 50
    several = MultilabelEvaluator(["x", "y"])
    several.process(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([[1, 0], [0, -1], [1, 0]]))
    assert details_of(several).curves == {"x": curve["x"]}


def test_details_are_read_as_they_were_written(tmp_path):
    one = Details({"a": {"top1": 0.5}}, ["a", "b"], [[1, 2], [3, 4]], {"a": [0.25] * 101}, 2.5)
    details = {"bissl": one, "x": Details()}
    write_details(tmp_path, details)
    assert read_details(tmp_path) == details
    assert read_details(tmp_path / "none") == {}
