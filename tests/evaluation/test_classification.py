import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation import TopKEvaluator


def classes(count):
    return [f"class{i}" for i in range(count)]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracies_and_confusions_agree_with_scikit_learn_over_several_batches():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(200, 7, generator=generator), torch.randint(0, 6, (200,), generator=generator)
    evaluator = TopKEvaluator(classes(7))
    for part in range(0, 200, 64):
        evaluator.process(scores[part : part + 64], labels[part : part + 64])
    assert evaluator.confusion().tolist() == confusion_matrix(labels, scores.argmax(1), labels=range(7)).tolist()
    metrics = evaluator.evaluate()
    for k in (1, 5):  # both count the same whole numbers; only the last division rounds
        reference = top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert metrics[f"top{k}"] == pytest.approx(reference, rel=1e-12)
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)), rel=1e-12)
    metrics = evaluator.per_class()
    assert list(metrics) == classes(6)  # of the last there is no sample
    for label, name in enumerate(metrics):
        members = labels == label
        for k in (1, 5):
            reference = top_k_accuracy_score(labels[members], scores[members], k=k, labels=range(7))
            assert metrics[name][f"top{k}"] == pytest.approx(reference, rel=1e-12)


def test_the_first_of_equal_scores_is_predicted():
    evaluator = TopKEvaluator(classes(3))
    evaluator.process(torch.tensor([[0.0, 1.0, 1.0]] * 3), torch.arange(3))
    assert evaluator.confusion().tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert [m["top1"] for m in evaluator.per_class().values()] == [0.0, 1.0, 0.0]
    evaluator.reset()
    assert evaluator.confusion().sum() == 0 and evaluator.per_class() == {}


def test_an_empty_set_is_an_error():
    evaluator = TopKEvaluator(classes(2))
    with pytest.raises(DatasetError, match="no sample was processed"):
        evaluator.evaluate()
    evaluator.process(torch.eye(2), torch.arange(2))
    evaluator.reset()
    with pytest.raises(DatasetError, match="no sample was processed"):
        evaluator.evaluate()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.full((1, 2), float("nan")), torch.tensor([0]), "NaN or infinite"),
        (torch.zeros(1, 2), torch.tensor([2]), "targets range from 2 to 2, but there are 2 classes"),
        (torch.zeros(1, 3), torch.tensor([0]), r"shape \(1, 3\)"),
    ],
)
def test_invalid_scores_and_targets_are_refused(scores, labels, message):
    with pytest.raises(BisslZooError, match=message):
        TopKEvaluator(classes(2)).process(scores, labels)
