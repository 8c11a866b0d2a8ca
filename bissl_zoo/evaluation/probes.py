"""Probes of frozen features: a weighted k-nearest-neighbor and a linear classifier, and signs of collapse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.errors import BisslZooError
from bissl_zoo.evaluation.classification import TopKEvaluator

#: maximum number of similarities in memory at once, 128 MB of float32
CHUNK = 2**25
#: learning rates for standardized features: the smallest is slow on any set, the largest unstable on wide features
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
#: of the linear probe: samples per step, momentum of SGD, and share of each class that is held out
BATCH_SIZE, MOMENTUM, HELD_OUT = 256, 0.9, 0.1


@torch.no_grad()
def knn_probabilities(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Classify by weighted k-nearest neighbors (Wu et al., arXiv 1805.01978, section 3.4, with k = 200).

    The k training features with the largest cosine similarity s vote for their classes with weight
    `exp(s / temperature)`. DINO uses k = 20 (arXiv 2104.14294, section 3.2). Features tied at the k-th similarity share
    the remaining votes, so the order of the training set does not matter. If k exceeds N, all N vote.

    Args:
        train_features: `(N, D)`.
        train_labels: `(N,)`, int64 in [0, num_classes).
        test_features: `(M, D)`, on the same device.
        num_classes: number of classes.
        k: number of neighbors.
        temperature: temperature of the weights.
    Returns:
        Shares of the votes, float32 `(M, num_classes)`; rows sum to 1.
    Raises:
        BisslZooError: shapes or labels are invalid, or a feature is not finite.
    """
    if k < 1 or not temperature > 0:
        raise BisslZooError(f"kNN: k={k} must be 1 or more, and temperature={temperature} positive.")
    _check(train_features, train_labels)
    _check(test_features)
    bank = functional.normalize(train_features.float(), dim=1)
    k, votes = min(k, len(bank)), []
    for part in test_features.split(max(1, CHUNK // len(bank))):
        similarity = functional.normalize(part.float(), dim=1) @ bank.T
        best = similarity.topk(k, dim=1).values
        first, last = best[:, :1], best[:, -1:]
        above, tied = similarity > last, similarity == last
        share = (k - above.sum(dim=1, keepdim=True)) / tied.sum(dim=1, keepdim=True)
        rows, columns = (above | tied).nonzero(as_tuple=True)
        # subtract the largest similarity: the shares are equal, and exp() does not overflow
        weight = ((similarity[rows, columns] - first[rows, 0]) / temperature).exp()
        weight = torch.where(tied[rows, columns], weight * share[rows, 0], weight)
        counts = weight.new_zeros(len(part), num_classes)
        counts.index_put_((rows, train_labels[columns]), weight, accumulate=True)
        votes.append(counts / counts.sum(dim=1, keepdim=True))
    return torch.cat(votes)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Return `top1`, `top5` (with 5 or more classes) and `mean_per_class` of :func:`knn_probabilities`, as fractions.

    Raises:
        BisslZooError: see :func:`knn_probabilities`.
    """
    num_classes = _num_classes(train_labels, test_labels)
    _check(test_features, test_labels)
    votes = knn_probabilities(train_features, train_labels, test_features, num_classes, k, temperature)
    evaluator = TopKEvaluator([str(label) for label in range(num_classes)])
    evaluator.process(votes, test_labels)
    return evaluator.evaluate()


@dataclass(frozen=True)
class LinearProbe:
    """Result of :func:`linear_probe`.

    Attributes:
        metrics: metrics on the test set.
        learning_rate: the selected learning rate.
        held_out: top-1 on the held-out part of the training set per learning rate.
    """

    metrics: dict[str, float]
    learning_rate: float
    held_out: dict[float, float]


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier on frozen features by SGD, with several learning rates in parallel.

    As in DINOv2 (arXiv 2304.07193, appendix B.3), all rates share each pass over the data. The rate is selected on a
    stratified held-out part of the training set; then a classifier is trained with it on the whole training set and
    evaluated once on the test set. Features are standardized with mean and deviation of the training set, so that one
    range of rates fits all features (like the batch norm in MAE's probe, arXiv 2111.06377, appendix A.1). The rates
    follow half a cosine to zero.

    Args:
        train_features, test_features: `(N, D)` and `(M, D)`, on one device.
        train_labels, test_labels: `(N,)` and `(M,)`, int64.
        epochs: passes over the training set.
        seed: seed of the held-out part and of the order of samples; the result is deterministic.
    Raises:
        BisslZooError: shapes or labels are invalid, a feature is not finite, or no class has two samples.
    """
    num_classes = _num_classes(train_labels, test_labels)
    _check(train_features, train_labels)
    _check(test_features, test_labels)
    std, mean = torch.std_mean(train_features.float(), dim=0, correction=0)
    # a constant feature has no information, and its deviation is rounding error
    scale = torch.where(std > 1e-5 * mean.abs(), 1 / std, torch.zeros_like(std))
    train, test = ((part.float() - mean) * scale for part in (train_features, test_features))
    generator = torch.Generator().manual_seed(seed)
    choosing = stratified(train_labels.cpu(), HELD_OUT, generator).to(train.device)
    settings = (num_classes, epochs, BATCH_SIZE, generator)
    weight, bias = _train_side_by_side(train[~choosing], train_labels[~choosing], LEARNING_RATES, *settings)
    accuracies = [
        ((train[choosing] @ w + b).argmax(dim=1) == train_labels[choosing]).double().mean().item()
        for w, b in zip(weight, bias, strict=True)
    ]
    rate = LEARNING_RATES[accuracies.index(max(accuracies))]
    weight, bias = _train_side_by_side(train, train_labels, [rate], *settings)
    evaluator = TopKEvaluator([str(label) for label in range(num_classes)])
    evaluator.process(test @ weight[0] + bias[0], test_labels)
    return LinearProbe(evaluator.evaluate(), rate, dict(zip(LEARNING_RATES, accuracies, strict=True)))


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Select a random part of a labelled set, bool `(N,)`: `share` of each class, at least one sample but never all.

    Raises:
        BisslZooError: no class has two samples.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if not chosen.any():
        raise BisslZooError("Linear probe: every class has a single sample, so none can be held out.")
    return chosen


@torch.no_grad()
def _train_side_by_side(
    features: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    num_classes: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train L classifiers on the same batches, from zero; return weights `(L, D, C)` and biases `(L, C)`."""
    weight = features.new_zeros(len(rates), features.shape[1], num_classes)
    bias = features.new_zeros(len(rates), 1, num_classes)
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    base = torch.tensor(rates, dtype=features.dtype, device=features.device)[:, None, None]
    total, step = epochs * math.ceil(len(features) / batch_size), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(features), generator=generator).split(batch_size):
            x, y = features[batch.to(features.device)], labels[batch.to(features.device)]
            error = (torch.matmul(x, weight) + bias).softmax(dim=2)  # (L, B, C), gradient of the cross entropy
            error = (error - functional.one_hot(y, num_classes)) / len(x)
            gradients = x.T @ error, error.sum(dim=1, keepdim=True)
            rate = base * (0.5 + 0.5 * math.cos(math.pi * step / total))
            for parameter, v, gradient in zip((weight, bias), velocity, gradients, strict=True):
                v.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rate * v)
            step += 1
    return weight, bias[:, 0]


def _num_classes(*labels: Tensor) -> int:
    return 1 + max(int(part.max()) if len(part) else 0 for part in labels)


def _check(features: Tensor, labels: Tensor | None = None) -> None:
    if features.ndim != 2 or len(features) == 0:
        raise BisslZooError(f"Probe: features must be (N, D) and not empty, not {tuple(features.shape)}.")
    if not torch.isfinite(features).all():
        raise BisslZooError("Probe: a feature is NaN or infinite; the backbone has diverged.")
    if labels is not None and (labels.shape != features.shape[:1] or labels.is_floating_point() or labels.min() < 0):
        raise BisslZooError(
            f"Probe: labels must be class indices, one per row of features {tuple(features.shape)}, not "
            f"{labels.dtype} {tuple(labels.shape)} from {labels.min()} to {labels.max()}."
        )


# metrics that detect collapsed embeddings without labels


def collapse_metrics(embeddings: Tensor) -> dict[str, float]:
    """Return both metrics below, for embeddings `(N, D)`."""
    return {"effective_rank": effective_rank(embeddings), "std": normalized_std(embeddings)}


@torch.no_grad()
def normalized_std(embeddings: Tensor) -> float:
    """Return the standard deviation of l2-normalized embeddings `(N, D)`, mean over dimensions, times sqrt(D).

    SimSiam (arXiv 2011.10566, section 4.1) compares it with 1 / sqrt(D). It is 0 if all embeddings have the same
    direction, and 1 if they are spread evenly around the origin. Features pooled after a ReLU are not negative and
    therefore stay below 1: a falling value indicates collapse, not its level.
    """
    _check(embeddings)
    z = functional.normalize(embeddings.double(), dim=1)
    return z.std(dim=0, correction=0).mean().item() * math.sqrt(z.shape[1])


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """Return the effective rank of embeddings `(N, D)`: RankMe (arXiv 2210.02885, equation 1).

    It is the exponential of the entropy of the normalized singular values, between 1 and min(N, D). N should exceed D;
    the paper uses N = 25,600. The paper's 1e-7 inside the logarithm is omitted, since 0 log 0 is defined as 0.
    """
    _check(embeddings)
    values = torch.linalg.svdvals(embeddings.double())
    if values[0] == 0:  # all embeddings are zero, which is constant
        return 1.0
    return torch.special.entr(values / values.sum()).sum().exp().item()
