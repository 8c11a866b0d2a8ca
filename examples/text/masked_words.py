"""BiSSL without images: masked words below, sentence classification above, the bilevel core and its solvers unchanged.

    python examples/text/masked_words.py

The text is what scikit-learn ships about its data sets. The pretext task fills in masked words (BERT, arXiv
1810.04805); the downstream task tells which data set a sentence is about. A few hundred sentences show that the core is
not tied to images; which of the two backbones comes out ahead is within chance.
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
    """Words `(B, L)` to features `(B, L, D)`: a transformer whose attention has second derivatives."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.attention = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mixing = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        hidden = (words == PADDING)[:, None, None]
        for attention, mixing, mlp in zip(self.attention, self.mixing, self.mlp, strict=True):
            q, k, v = attention(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(hidden, -1e4).softmax(dim=3)
            x = x + mixing((weights @ v).transpose(1, 2).flatten(2))
            x = x + mlp(x)
        return x


class MaskedWords(nn.Module):
    """Which words the masks hide; what a pretext method is to `BiLevel`."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.vocabulary = nn.Linear(width, WORDS)

    def losses(self, backbone: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        masked, words = batch
        hidden = masked == MASK
        return {"cross_entropy": functional.cross_entropy(self.vocabulary(backbone(masked)[hidden]), words[hidden])}

    def after_step(self, backbone: nn.Module) -> None:
        """There is neither teacher nor queue."""


class Topic(nn.Module):
    """Which text a sentence comes from; what a task is to `BiLevel`."""

    def __init__(self, topics: int, width: int = 48) -> None:
        super().__init__()
        self.linear = nn.Linear(width, topics)

    def logits(self, backbone: nn.Module, words: Tensor) -> Tensor:
        there = (words != PADDING)[..., None]
        return self.linear((backbone(words) * there).sum(dim=1) / there.sum(dim=1))

    def losses(self, backbone: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        words, topics = batch
        return {"cross_entropy": functional.cross_entropy(self.logits(backbone, words), topics)}


def sentences() -> tuple[Tensor, Tensor, int]:
    """Words `(N, L)` and topics `(N,)` of all sentences, in a fixed shuffled order, and the number of topics."""
    files = sorted(importlib.resources.files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".rst")]
    found = [
        (re.findall(r"[a-z]+", sentence.lower())[:LENGTH], topic)
        for topic, text in enumerate(texts)
        for sentence in re.split(r"[.:]\s", text)
    ]
    found = [(words, topic) for words, topic in found if len(words) >= 4]
    counts = Counter(word for words, _ in found for word in words)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 3), start=3)}
    words = torch.zeros(len(found), LENGTH, dtype=torch.int64)
    for row, (sentence, _) in zip(words, found, strict=True):
        row[: len(sentence)] = torch.tensor([number.get(word, UNKNOWN) for word in sentence])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return words[order], torch.tensor([topic for _, topic in found])[order], len(texts)


def masked_batches(words: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches with 15 % of the words masked; a batch carries its masks, so that its loss is one function."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = words[torch.randint(len(words), (size,), generator=generator)]
        hidden = (torch.rand(chosen.shape, generator=generator) < 0.15) & (chosen != PADDING)
        yield chosen.masked_fill(hidden, MASK), chosen


def labelled_batches(words: Tensor, topics: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of sentences with their topics."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(words), (size,), generator=generator)
        yield words[chosen], topics[chosen]


def level(name: str, backbone: nn.Module, head: nn.Module, batches: Iterator, lr: float = 2e-3) -> Level:
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=lr)
    return Level(name, backbone, head, optimizer, batches, LRMultiplier(ConstantParamScheduler(1.0)), 10**6)


def train(one: Level, steps: int) -> None:
    """A plain stage: pretraining or fine-tuning."""
    for _ in range(steps):
        one.loss(one.backbone, next(one.data_iterator))[0].backward()
        one.optimize()


def accuracy(backbone: nn.Module, topics: int, train_set, test_set, steps: int) -> float:
    """Of a copy of the backbone, fine-tuned with a new head."""
    torch.manual_seed(1)
    tuned = level("finetune", copy.deepcopy(backbone), Topic(topics), labelled_batches(*train_set, 32, seed=2))
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

    lower = level("lower", Encoder(), MaskedWords(), masked_batches(train_set[0], 64, seed=0))
    train(lower, args.pretrain_steps)
    pretrained = copy.deepcopy(lower.backbone)

    upper = level("upper", copy.deepcopy(pretrained), Topic(count), labelled_batches(*train_set, 32, seed=1))
    problem = BiLevel(lower, upper, MinRes(), lam=0.1, lower_steps=10, upper_steps=4, alternations=args.alternations)
    for alternation in range(args.alternations):
        figures = problem.alternate(alternation)
        print(
            f"alternation {alternation + 1}: pretext {figures['lower/cross_entropy']:.3f}, "
            f"downstream {figures['upper/cross_entropy']:.3f}, residual {figures['solver/residual']:.3f} after "
            f"{figures['solver/products']} products, damping {figures['solver/damping']:.2f}"
        )

    for name, backbone in (("pretrained", pretrained), ("bissl", lower.backbone)):
        found = accuracy(backbone, count, train_set, test_set, args.finetune_steps)
        print(f"fine-tuned from {name}: accuracy {found:.3f} on {len(test_set[0])} sentences")


if __name__ == "__main__":
    main()
