"""kNN and linear probe against scikit-learn, on synthetic features and on the pixels of handwritten digits."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from bissl_zoo.errors import BisslZooError
from bissl_zoo.evaluation import probes
from bissl_zoo.evaluation.probes import (
    _train_side_by_side,
    knn_accuracy,
    knn_probabilities,
    linear_probe,
    stratified,
)


def clusters(separation, classes=6, width=20, train=600, test=600, seed=0):
    """Gaussian classes whose means lie `separation` standard deviations from the origin."""
    generator = torch.Generator().manual_seed(seed)
    means = separation * torch.nn.functional.normalize(torch.randn(classes, width, generator=generator), dim=1)
    labels = torch.randint(0, classes, (train + test,), generator=generator)
    features = means[labels] + torch.randn(train + test, width, generator=generator)
    return features[:train], labels[:train], features[train:], labels[train:]


def digits():
    """The pixels of 1,797 handwritten digits, the first 1,000 to train."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    features = torch.tensor(data.data[order], dtype=torch.float32)
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    return features[:1000], labels[:1000], features[1000:], labels[1000:]


SETS = {"easy": clusters(6.0), "hard": clusters(2.0), "digits": digits()}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 1.0)])
def test_knn_predicts_what_scikit_learn_does(name, k, temperature):
    train, labels, test, truth = SETS[name]
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.double().numpy(), labels.numpy())
    votes = knn_probabilities(train, labels, test, int(labels.max()) + 1, k, temperature)
    assert torch.equal(votes.argmax(dim=1), torch.tensor(reference.predict(test.double().numpy())))
    # of float32 similarities, good to 1e-6 or so, divided by the temperature
    expected = reference.predict_proba(test.double().numpy())
    np.testing.assert_allclose(votes.numpy(), expected, atol=1e-4)
    metrics = knn_accuracy(train, labels, test, truth, k, temperature)
    assert metrics["top1"] == reference.score(test.double().numpy(), truth.numpy())


@pytest.mark.parametrize("chunk", [1, 6000, 7001])
def test_knn_does_not_depend_on_the_chunk_size(chunk, monkeypatch):
    train, labels, test, _ = SETS["hard"]
    whole = knn_probabilities(train, labels, test, 6)
    monkeypatch.setattr(probes, "CHUNK", chunk)
    # another size of block, another order of adding up
    torch.testing.assert_close(knn_probabilities(train, labels, test, 6), whole, rtol=1e-4, atol=1e-6)


def test_a_k_beyond_the_training_set_is_all_of_it():
    train, labels, test, _ = clusters(2.0, train=30, test=10)
    everything = knn_probabilities(train, labels, test, 6, k=30)
    assert torch.equal(knn_probabilities(train, labels, test, 6, k=1000), everything)
    similarity = torch.nn.functional.cosine_similarity(test.double()[:, None], train.double()[None], dim=2)
    weights = (similarity / 0.07).exp() @ torch.nn.functional.one_hot(labels, 6).double()
    torch.testing.assert_close(everything.double(), weights / weights.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_neighbours_that_tie_for_the_last_place_share_it():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, -1.0]])
    labels = torch.tensor([0, 1, 2, 2, 0])
    test = torch.tensor([[1.0, 0.0]])
    # one at similarity 1; then four at 0, which share one place, then two
    for k, share in ((2, 1 / 4), (3, 2 / 4), (5, 1.0)):
        tied = share * math.exp(-1 / 0.5)
        expected = torch.tensor([1 + tied, tied, 2 * tied])
        votes = knn_probabilities(train, labels, test, 3, k=k, temperature=0.5)
        torch.testing.assert_close(votes[0], expected / expected.sum())


@pytest.mark.parametrize("name", SETS)
def test_the_linear_probe_is_as_good_as_logistic_regression(name):
    train, labels, test, truth = SETS[name]
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-3)
    scores = []
    for penalty in (0.01, 0.1, 1.0):
        reference = LogisticRegression(C=penalty, max_iter=2000).fit(((train - mean) / std).numpy(), labels.numpy())
        scores.append(reference.score(((test - mean) / std).numpy(), truth.numpy()))
    probe = linear_probe(train, labels, test, truth)
    best = max(scores)
    # twice the standard error of an accuracy on this many samples, of which most errors are the same
    tolerance = 2 * math.sqrt(best * (1 - best) / len(truth)) + 1 / len(truth)
    assert probe.metrics["top1"] == pytest.approx(best, abs=tolerance)


def test_the_steps_are_those_of_torch_sgd_with_momentum_and_cosine():
    train, labels, *_ = clusters(1.0, classes=3, width=5, train=50)
    train, rates = train.double(), [0.01, 0.3]
    generator = torch.Generator().manual_seed(3)
    weight, bias = _train_side_by_side(train, labels, rates, 3, 4, 16, generator)
    for index, rate in enumerate(rates):
        order = torch.Generator().manual_seed(3)
        linear = torch.nn.Linear(5, 3).double()
        for parameter in linear.parameters():
            torch.nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 4)
        for _ in range(4):
            for batch in torch.randperm(50, generator=order).split(16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(linear(train[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(weight[index], linear.weight.detach().T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias[index], linear.bias.detach(), rtol=1e-9, atol=1e-12)


def test_the_rate_is_chosen_without_a_look_at_the_test_set():
    train, labels, test, truth = SETS["hard"]
    real = linear_probe(train, labels, test, truth, epochs=5)
    wrong = linear_probe(train, labels, -test, (truth + 1) % 6, epochs=5)
    assert wrong.learning_rate == real.learning_rate and wrong.held_out == real.held_out
    assert wrong.metrics != real.metrics


def test_a_seed_gives_one_result_and_the_global_random_state_stays():
    train, labels, test, truth = SETS["hard"]
    state = torch.get_rng_state()
    first = linear_probe(train, labels, test, truth, epochs=3, seed=1)
    assert linear_probe(train, labels, test, truth, epochs=3, seed=1) == first
    assert linear_probe(train, labels, test, truth, epochs=3, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_the_scale_of_features_and_constant_ones_do_not_matter():
    train, labels, test, truth = SETS["hard"]
    plain = linear_probe(train, labels, test, truth, epochs=5)
    scale = torch.logspace(-6, 6, train.shape[1])
    stretched = linear_probe(train * scale, labels, test * scale, truth, epochs=5)
    assert stretched.metrics["top1"] == pytest.approx(plain.metrics["top1"], abs=2 / len(truth))  # rounding
    with_constant = [torch.cat([part, torch.full((len(part), 1), 5.0)], dim=1) for part in (train, test)]
    padded = linear_probe(with_constant[0], labels, with_constant[1], truth, epochs=5)
    assert padded.metrics["top1"] == pytest.approx(plain.metrics["top1"], abs=2 / len(truth))


def test_what_is_held_out_is_a_share_of_every_class_that_has_two():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2 + [3])
    held = stratified(labels, 0.1, torch.Generator().manual_seed(0))
    assert [int(held[labels == label].sum()) for label in range(4)] == [4, 2, 1, 0]
    other = stratified(labels, 0.1, torch.Generator().manual_seed(1))
    assert not torch.equal(held, other)
    with pytest.raises(BisslZooError, match="single sample"):
        stratified(torch.arange(3), 0.1, torch.Generator())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_features": torch.full((4, 2), math.nan)}, "NaN or infinite"),
        ({"train_features": torch.zeros(4)}, r"features must be \(N, D\)"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, "one per row"),
        ({"train_labels": torch.zeros(4)}, "class indices"),
        ({"train_labels": torch.tensor([0, 1, -1, 0])}, "from -1 to 1"),
        ({"test_features": torch.zeros(0, 2)}, "not empty"),
    ],
)
def test_invalid_inputs_are_refused(changed, message):
    arguments = {
        "train_features": torch.randn(4, 2),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test_features": torch.randn(2, 2),
        "test_labels": torch.tensor([0, 1]),
    } | changed
    for probe in (knn_accuracy, linear_probe):
        with pytest.raises(BisslZooError, match=message):
            probe(**arguments)
