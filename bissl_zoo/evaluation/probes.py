"""What frozen features are worth: a weighted nearest-neighbour classifier and a linear one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.errors import BisslZooError
from bissl_zoo.evaluation.classification import TopKEvaluator

#: similarities that are held at once, 128 MB of float32
CHUNK = 2**25

#: rates for standardised features: the least are slow on any set, the largest unstable on wide features
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def knn_probabilities(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = CHUNK,
) -> Tensor:
    """Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978, section 3.4, with k = 200).

    The k training features of largest cosine similarity s vote for their classes by `exp(s / temperature)`; k = 20 is
    DINO's (arXiv 2104.14294, section 3.2). Where several share the k-th similarity, they share the places that are
    left, so that the order of the training set does not matter. A k above N means all N.

    Args:
        train_features: `(N, D)`; train_labels: `(N,)` int64 in [0, num_classes).
        test_features: `(M, D)`, on the same device.
        chunk: most similarities to hold at once; the memory needed is a small multiple of it.
    Returns:
        `(M, num_classes)` float32 shares of the votes; rows sum to 1.
    Raises:
        BisslZooError: shapes, labels, k or temperature that cannot be, or features that are not finite.
    """
    _check(train_features, train_labels, num_classes)
    _check(test_features, None, num_classes)
    return torch.cat(list(_votes(train_features, train_labels, test_features, num_classes, k, temperature, chunk)))


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = CHUNK,
) -> dict[str, float]:
    """`top1`, `top5` (of 5 classes or more) and `mean_per_class` of :func:`knn_probabilities`, as fractions.

    Raises:
        BisslZooError: as there.
    """
    num_classes = _num_classes(train_labels, test_labels)
    _check(train_features, train_labels, num_classes)
    _check(test_features, test_labels, num_classes)
    evaluator = TopKEvaluator([str(label) for label in range(num_classes)])
    done = 0
    for votes in _votes(train_features, train_labels, test_features, num_classes, k, temperature, chunk):
        evaluator.process(votes, test_labels[done : done + len(votes)])
        done += len(votes)
    return evaluator.evaluate()


@torch.no_grad()
def _votes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int,
) -> Iterator[Tensor]:
    if k < 1 or not temperature > 0:
        raise BisslZooError(f"kNN: k={k} must be 1 or more, and temperature={temperature} positive.")
    bank = functional.normalize(train_features.float(), dim=1)
    k = min(k, len(bank))
    for part in test_features.split(max(1, chunk // len(bank))):
        similarity = functional.normalize(part.float(), dim=1) @ bank.T
        best = similarity.topk(k, dim=1).values
        first, last = best[:, :1], best[:, -1:]
        above, tied = similarity > last, similarity == last
        share = (k - above.sum(dim=1, keepdim=True)) / tied.sum(dim=1, keepdim=True)
        rows, columns = (above | tied).nonzero(as_tuple=True)
        # the largest similarity is taken off, which leaves the shares as they are and exp() in range
        weight = ((similarity[rows, columns] - first[rows, 0]) / temperature).exp()
        weight = torch.where(tied[rows, columns], weight * share[rows, 0], weight)
        votes = weight.new_zeros(len(part), num_classes)
        votes.index_put_((rows, train_labels[columns]), weight, accumulate=True)
        yield votes / votes.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class LinearProbe:
    """What :func:`linear_probe` found: `metrics` on the test set, the rate chosen, and what it was chosen by.

    Attributes:
        held_out: per learning rate, top-1 on the part of the training set that was held out.
    """

    metrics: dict[str, float]
    learning_rate: float
    held_out: dict[float, float]


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    held_out: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """A linear classifier on frozen features, trained by SGD for several learning rates side by side.

    As in DINOv2 (arXiv 2304.07193, appendix B.3) one pass over the data serves all rates. The rate is chosen on a
    stratified part of the training set; with it a last classifier is trained on the whole of that set, and the test set
    is looked at once. Features are standardised by the training set's mean and deviation, which gives the rates one
    scale and leaves what is linear linear (the batch norm of MAE's probe, arXiv 2111.06377, appendix A.1). Rates fall
    to zero by half a cosine.

    Args:
        train_features: `(N, D)`; train_labels: `(N,)` int64; likewise of the test set, all on one device.
        held_out: share of each class that the rate is chosen on; at least one sample of a class that has two.
        seed: of that part and of the order of samples; the same seed gives the same result.
    Raises:
        BisslZooError: shapes or labels that do not fit, features that are not finite, or no class with two samples.
    """
    num_classes = _num_classes(train_labels, test_labels)
    _check(train_features, train_labels, num_classes)
    _check(test_features, test_labels, num_classes)
    std, mean = torch.std_mean(train_features.float(), dim=0, correction=0)
    # a constant feature says nothing, and its deviation is what rounding makes of it
    scale = torch.where(std > 1e-5 * mean.abs(), 1 / std, torch.zeros_like(std))
    train, test = ((part.float() - mean) * scale for part in (train_features, test_features))
    generator = torch.Generator().manual_seed(seed)
    choosing = stratified(train_labels.cpu(), held_out, generator).to(train.device)

    def fit(features: Tensor, labels: Tensor, rates: Sequence[float]) -> tuple[Tensor, Tensor]:
        settings = (num_classes, rates, epochs, batch_size, momentum, weight_decay, generator)
        return _train_side_by_side(features, labels, *settings)

    weight, bias = fit(train[~choosing], train_labels[~choosing], learning_rates)
    right = [
        ((train[choosing] @ w + b).argmax(dim=1) == train_labels[choosing]).double().mean().item()
        for w, b in zip(weight, bias, strict=True)
    ]
    rate = learning_rates[right.index(max(right))]
    weight, bias = fit(train, train_labels, [rate])
    evaluator = TopKEvaluator([str(label) for label in range(num_classes)])
    evaluator.process(test @ weight[0] + bias[0], test_labels)
    return LinearProbe(evaluator.evaluate(), rate, dict(zip(learning_rates, right, strict=True)))


def stratified(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random part of a labelled set, bool `(N,)`: `share` of each class, one or more, and never all of it.

    Raises:
        BisslZooError: there is no class with two samples to tell apart.
    """
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=generator)
    for label in labels.unique():
        mine = order[labels[order] == label]
        chosen[mine[: min(max(1, round(share * len(mine))), len(mine) - 1)]] = True
    if not chosen.any():
        raise BisslZooError("Linear probe: every class has a single sample, so that none can be held out.")
    return chosen


@torch.no_grad()
def _train_side_by_side(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Weights `(L, D, C)` and biases `(L, C)` of L classifiers that see the same batches, from zero."""
    weight = features.new_zeros(len(rates), features.shape[1], num_classes)
    bias = features.new_zeros(len(rates), 1, num_classes)
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    base = torch.tensor(rates, dtype=features.dtype, device=features.device)[:, None, None]
    total, step = epochs * math.ceil(len(features) / batch_size), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(features), generator=generator).split(batch_size):
            x, y = features[batch.to(features.device)], labels[batch.to(features.device)]
            error = (torch.matmul(x, weight) + bias).softmax(dim=2)  # (L, B, C), of cross entropy
            error = (error - functional.one_hot(y, num_classes)) / len(x)
            gradients = x.T @ error + weight_decay * weight, error.sum(dim=1, keepdim=True)
            rate = base * (0.5 + 0.5 * math.cos(math.pi * step / total))
            for parameter, v, gradient in zip((weight, bias), velocity, gradients, strict=True):
                v.mul_(momentum).add_(gradient)
                parameter.sub_(rate * v)
            step += 1
    return weight, bias[:, 0]


def _num_classes(*labels: Tensor) -> int:
    return 1 + max(int(part.max()) if len(part) else 0 for part in labels)


def _check(features: Tensor, labels: Tensor | None, num_classes: int) -> None:
    if features.ndim != 2 or len(features) == 0:
        raise BisslZooError(f"Probe: features are (N, D) and not empty; these are {tuple(features.shape)}.")
    if not torch.isfinite(features).all():
        raise BisslZooError("Probe: a feature is NaN or infinite; the backbone has diverged.")
    if labels is None:
        return
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise BisslZooError(
            f"Probe: labels are whole numbers, one per row of features {tuple(features.shape)}; these are "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise BisslZooError(
            f"Probe: labels range from {int(labels.min())} to {int(labels.max())}, with {num_classes} classes."
        )
