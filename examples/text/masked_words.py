"""BiSSL for text: masked words in the lower level, sentence classification in the upper level.

    python examples/text/masked_words.py

The text is the description of scikit-learn's data sets. The pretext task predicts masked words (BERT, arXiv
1810.04805); the downstream task classifies sentences by data set. The bilevel core and the solvers are used unchanged.
A few hundred sentences show that the core does not depend on images; the accuracies differ by noise.
"""

import argparse
import copy
import importlib.resources
import re
from collections import Counter
from collections.abc import Iterator

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import Tensor, nn
from torch.nn import functional

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.hypergradient import MinRes
from bissl_zoo.optim import LRMultiplier

PADDING, UNKNOWN, MASK = 0, 1, 2
LENGTH, WORDS = 24, 1000


class Encoder(nn.Module):
    """Transformer from words `(B, L)` to features `(B, L, D)`, with attention that has second derivatives."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.positions = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.attention = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mixing = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.positions
        hidden = (words == PADDING)[:, None, None]
        for attention, mixing, mlp in zip(self.attention, self.mixing, self.mlp, strict=True):
            q, k, v = attention(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(hidden, -1e4).softmax(dim=3)
            x = x + mixing((weights @ v).transpose(1, 2).flatten(2))
            x = x + mlp(x)
        return x


class MaskedWords(nn.Module):
    """Prediction of masked words, with the interface of a pretext method."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.vocabulary = nn.Linear(width, WORDS)

    def losses(self, backbone: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        masked, words = batch
        hidden = masked == MASK
        return {"cross_entropy": functional.cross_entropy(self.vocabulary(backbone(masked)[hidden]), words[hidden])}

    def after_step(self, backbone: nn.Module) -> None:
        """Do nothing: there is no teacher and no queue."""


class Topic(nn.Module):
    """Classification of sentences by data set, with the interface of a downstream task."""

    def __init__(self, topics: int, width: int = 48) -> None:
        super().__init__()
        self.linear = nn.Linear(width, topics)

    def logits(self, backbone: nn.Module, words: Tensor) -> Tensor:
        present = (words != PADDING)[..., None]
        return self.linear((backbone(words) * present).sum(dim=1) / present.sum(dim=1))

    def losses(self, backbone: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        words, topics = batch
        return {"cross_entropy": functional.cross_entropy(self.logits(backbone, words), topics)}


def sentences() -> tuple[Tensor, Tensor, int]:
    """Return words `(N, L)` and topics `(N,)` of all sentences, in a fixed random order, and the number of topics."""
    files = sorted(importlib.resources.files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".rst")]
    labelled = [
        (re.findall(r"[a-z]+", sentence.lower())[:LENGTH], topic)
        for topic, text in enumerate(texts)
        for sentence in re.split(r"[.:]\s", text)
    ]
    labelled = [(words, topic) for words, topic in labelled if len(words) >= 4]
    counts = Counter(word for words, _ in labelled for word in words)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 3), start=3)}
    words = torch.zeros(len(labelled), LENGTH, dtype=torch.int64)
    for row, (sentence, _) in zip(words, labelled, strict=True):
        row[: len(sentence)] = torch.tensor([number.get(word, UNKNOWN) for word in sentence])
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
    return words[order], torch.tensor([topic for _, topic in labelled])[order], len(texts)


def masked_batches(words: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches with 15 % of the words masked; masks are part of a batch, so that its loss is deterministic."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = words[torch.randint(len(words), (size,), generator=generator)]
        hidden = (torch.rand(chosen.shape, generator=generator) < 0.15) & (chosen != PADDING)
        yield chosen.masked_fill(hidden, MASK), chosen


def labelled_batches(words: Tensor, topics: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of sentences and topics."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(words), (size,), generator=generator)
        yield words[chosen], topics[chosen]


def make_level(name: str, backbone: nn.Module, head: nn.Module, batches: Iterator, lr: float = 2e-3) -> Level:
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=lr)
    return Level(name, backbone, head, optimizer, batches, LRMultiplier(ConstantParamScheduler(1.0)), 10**6)


def train(level: Level, steps: int) -> None:
    """Run `steps` optimizer steps of pretraining or fine-tuning."""
    for _ in range(steps):
        level.loss(level.backbone, next(level.data_iterator))[0].backward()
        level.optimize()


def accuracy(backbone: nn.Module, topics: int, train_set, test_set, steps: int) -> float:
    """Fine-tune a copy of the backbone with a new head and return its test accuracy."""
    torch.manual_seed(1)
    tuned = make_level("finetune", copy.deepcopy(backbone), Topic(topics), labelled_batches(*train_set, 32, seed=2))
    train(tuned, steps)
    with torch.no_grad():
        return float((tuned.head.logits(tuned.backbone, test_set[0]).argmax(dim=1) == test_set[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--alternations", type=int, default=10)
    parser.add_argument("--finetune-steps", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    words, topics, count = sentences()
    split = len(words) * 3 // 4
    train_set, test_set = (words[:split], topics[:split]), (words[split:], topics[split:])
    print(f"{len(words)} sentences about {count} data sets, {split} to train on")

    lower = make_level("lower", Encoder(), MaskedWords(), masked_batches(train_set[0], 64, seed=0))
    train(lower, args.pretrain_steps)
    pretrained = copy.deepcopy(lower.backbone)

    upper = make_level("upper", copy.deepcopy(pretrained), Topic(count), labelled_batches(*train_set, 32, seed=1))
    problem = BiLevel(lower, upper, MinRes(), lam=0.1, lower_steps=10, upper_steps=4, alternations=args.alternations)
    for alternation in range(args.alternations):
        metrics = problem.alternate(alternation)
        print(
            f"alternation {alternation + 1}: pretext {metrics['lower/cross_entropy']:.3f}, "
            f"downstream {metrics['upper/cross_entropy']:.3f}, residual {metrics['solver/residual']:.3f} after "
            f"{metrics['solver/products']} products, damping {metrics['solver/damping']:.2f}"
        )

    for name, backbone in (("pretrained", pretrained), ("bissl", lower.backbone)):
        value = accuracy(backbone, count, train_set, test_set, args.finetune_steps)
        print(f"fine-tuned from {name}: accuracy {value:.3f} on {len(test_set[0])} sentences")


if __name__ == "__main__":
    main()
