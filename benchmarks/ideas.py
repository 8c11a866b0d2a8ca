"""Measure the effect of lambda, gamma, damping and the number of upper steps on a problem that takes minutes.

    OMP_NUM_THREADS=1 python benchmarks/ideas.py --output docs/figures
    python benchmarks/ideas_figures.py

The data are scikit-learn's handwritten digits of 8 x 8 pixels, the encoder is an MLP of 20,704 parameters. Pretext:
SimCLR on 1,000 images without labels, with shifts, contrast and noise as views. Downstream: the class, from 200 labels.
For each value of each parameter, one BiSSL stage starts from the same pretrained encoder and is followed by
fine-tuning, over `--seeds` seeds of pretraining, labels and batches. `ideas_NAME.csv` has one line per stage.
"""

import argparse
import copy
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import flatten
from bissl_zoo.hypergradient import ConjugateGradient, MinRes
from bissl_zoo.hypergradient.solver import relative_residual
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext.simclr import nt_xent

UNLABELLED, LABELLED = 1000, 200
PRETRAIN_STEPS, FINETUNE_STEPS, HEAD_STEPS = 400, 100, 100
LR, MOMENTUM = 0.02, 0.9
SETTING = {"lambda": 0.05, "gamma": 1.0, "damping": 3.0, "upper_steps": 4, "lower_steps": 10, "alternations": 20}
VALUES = {
    "lambda": [0.0003, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0],
    "gamma": [0.0, 0.01, 0.1, 1.0, 10.0],
    "upper_steps": [0, 1, 2, 4, 8],
    "damping": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
}


class Encoder(nn.Module):
    """Smooth MLP from images `(N, 64)` to features `(N, 64)`, with second derivatives everywhere."""

    def __init__(self, hidden: int = 160) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 64))

    def forward(self, images: Tensor) -> Tensor:
        return functional.gelu(self.layers(images))


class Contrast(nn.Module):
    """SimCLR loss with the interface of a lower level."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))

    def losses(self, backbone: nn.Module, views: Tensor) -> dict[str, Tensor]:
        return {"nt_xent": nt_xent(self.projector(backbone(views)), 0.5)}

    def after_step(self, backbone: nn.Module) -> None:
        """Do nothing: there is no teacher."""


class Classify(nn.Module):
    """Linear classifier of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def losses(self, backbone: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": functional.cross_entropy(self.linear(backbone(batch[0])), batch[1])}


class Digits:
    """Images in three parts, shuffled with `seed`, as endless batches."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.seed = seed
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
        images = torch.tensor(digits.data, dtype=torch.float32)[order] / 8 - 1
        classes = torch.tensor(digits.target)[order]
        unlabelled = images[:UNLABELLED].view(-1, 8, 8)
        shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        self.shifted = torch.stack([unlabelled.roll(shift, (1, 2)).flatten(1) for shift in shifts])  # (9, U, 64)
        self.train = images[:LABELLED], classes[:LABELLED]
        self.test = images[UNLABELLED:], classes[UNLABELLED:]

    def views(self, size: int = 64, seed: int = 0) -> Iterator[Tensor]:
        """Yield two views of each of `size` images, `(2 size, 64)`."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        while True:
            images = torch.randint(UNLABELLED, (size,), generator=generator).repeat(2)
            moved = self.shifted[torch.randint(9, (2 * size,), generator=generator), images]
            contrast = 0.6 + 0.8 * torch.rand(2 * size, 1, generator=generator)
            noise = 0.3 * torch.randn(2 * size, 64, generator=generator)
            yield moved * contrast + noise

    def labelled(self, size: int = 32, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(size, 64)` and classes `(size,)` of the labelled part."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        while True:
            chosen = torch.randint(LABELLED, (size,), generator=generator)
            yield self.train[0][chosen], self.train[1][chosen]


def make_level(
    name: str, backbone: nn.Module, head: nn.Module, batches: Iterator, optimizer: torch.optim.Optimizer
) -> Level:
    return Level(name, backbone, head, optimizer, batches, LRMultiplier(ConstantParamScheduler(1.0)), 10**6)


def train(level: Level, steps: int) -> None:
    for _ in range(steps):
        level.loss(level.backbone, next(level.data_iterator))[0].backward()
        level.optimize()


def momentum_sgd(*modules: nn.Module) -> SGD:
    return SGD([p for module in modules for p in module.parameters()], lr=LR, momentum=MOMENTUM)


def accuracy(backbone: nn.Module, head: Classify, part: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((head.linear(backbone(part[0])).argmax(dim=1) == part[1]).float().mean())


class Start:
    """Starting point of a stage: a pretrained encoder, its pretext head, and a warmed-up downstream head."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.digits, self.encoder, self.contrast, self.classify = Digits(seed), Encoder(), Contrast(), Classify()
        both = [*self.encoder.parameters(), *self.contrast.parameters()]
        train(
            make_level("pretrain", self.encoder, self.contrast, self.digits.views(seed=1), AdamW(both, 2e-3)),
            PRETRAIN_STEPS,
        )
        frozen = copy.deepcopy(self.encoder).requires_grad_(False)
        heads = AdamW(self.classify.parameters(), 1e-2)
        train(make_level("warmup", frozen, self.classify, self.digits.labelled(seed=2), heads), HEAD_STEPS)
        self.pretrained_finetuned = self.finetuned(self.encoder)

    def problem(self, setting: dict[str, float]) -> BiLevel:
        """Build the bilevel problem from this starting point, solved to 5 % with at most 20 products."""
        nets = [copy.deepcopy(module) for module in (self.encoder, self.contrast, self.encoder, self.classify)]
        lower = make_level("lower", *nets[:2], self.digits.views(seed=3), momentum_sgd(*nets[:2]))
        upper = make_level("upper", *nets[2:], self.digits.labelled(seed=4), momentum_sgd(*nets[2:]))
        return BiLevel(
            lower,
            upper,
            MinRes(iterations=20, tolerance=0.05, damping=setting["damping"]),
            lam=setting["lambda"],
            gamma=setting["gamma"],
            **{key: int(setting[key]) for key in ("lower_steps", "upper_steps", "alternations")},
        )

    def finetuned(self, encoder: nn.Module) -> float:
        """Fine-tune a copy of the encoder with a new head and return its test accuracy."""
        torch.manual_seed(self.digits.seed)
        net, head = copy.deepcopy(encoder), Classify()
        train(make_level("finetune", net, head, self.digits.labelled(seed=5), momentum_sgd(net, head)), FINETUNE_STEPS)
        return accuracy(net, head, self.digits.test)


def stage(start: Start, name: str, value: float) -> dict[str, float]:
    """Run one BiSSL stage with `name` set to `value` and return its measurements."""
    setting = SETTING | {name: value}
    problem = start.problem(setting)
    metrics = [problem.alternate(number) for number in range(setting["alternations"])]
    lower, upper = problem.lower, problem.upper
    theta_p, theta_d, theta_0 = (
        flatten([p.detach() for p in net.parameters()]) for net in (lower.backbone, upper.backbone, start.encoder)
    )
    views = next(start.digits.views(size=500, seed=6))
    with torch.no_grad():
        pretext = float(lower.head.losses(lower.backbone, views)["nt_xent"])
        downstream = {
            level.name: upper.head.losses(level.backbone, start.digits.test)["cross_entropy"].item()
            for level in (lower, upper)
        }
    cosines = [step["solver/cos_x_plain"] for step in metrics if "solver/cos_x_plain" in step]
    return {
        name: value,
        "seed": start.digits.seed,
        "gap": float((theta_p - theta_d).norm()),
        "moved": float((theta_d - theta_0).norm()),
        "pretext_loss": pretext,
        "downstream_loss_lower": downstream["lower"],
        "downstream_loss_upper": downstream["upper"],
        "cosine": statistics.mean(cosines) if cosines else float("nan"),
        "finetuned": start.finetuned(lower.backbone),
        "pretrained_finetuned": start.pretrained_finetuned,
    }


def solves(start: Start, damping: float) -> dict[str, float]:
    """Measure one hypergradient at the pretrained encoder: its distance from `v` and the residuals of the solvers."""
    problem = start.problem(SETTING | {"damping": damping})
    operator = problem.curvature(problem.lower.next_batch()).prepare()
    lower, upper = problem.lower, problem.upper
    total, _ = upper.loss(lower.backbone, upper.next_batch())
    v = flatten(torch.autograd.grad(total, lower.backbone_parameters))
    residual_v = relative_residual(operator, v, v)
    exact = MinRes(iterations=200, tolerance=1e-4, damping=damping, recycle=0)(operator, v)
    five = ConjugateGradient(iterations=5, tolerance=1e-4, damping=damping)(operator, v)
    operator.release()
    return {
        "damping": damping,
        "seed": start.digits.seed,
        "cosine_x_v": float(functional.cosine_similarity(exact.x, v, dim=0)),
        "norm_x_over_v": float(exact.x.norm() / v.norm()),
        "residual_v": residual_v,
        "residual_cg5": five.residual,
        "residual_minres200": exact.residual,
    }


def measure(name: str, starts: list[Start], output: Path) -> None:
    """Write `ideas_NAME.csv`."""
    run = solves if name == "damping" else lambda start, value: stage(start, name, value)
    rows = [run(start, value) for value in VALUES[name] for start in starts]
    with (output / f"ideas_{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    print(f"{name}: {len(rows)} rows", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=VALUES, default=list(VALUES))
    args = parser.parse_args()
    starts = [Start(seed) for seed in range(args.seeds)]
    for name in args.only:
        measure(name, starts, args.output)


if __name__ == "__main__":
    main()
