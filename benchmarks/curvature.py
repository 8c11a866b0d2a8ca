#!/usr/bin/env python
"""Gauss-Newton matrix and Hessian of SimCLR on a briefly trained resnet18: residual against products and damping.

    python benchmarks/curvature.py cifar10_jpeg.npz

The right-hand side is the gradient of a classifier's loss in the backbone. The residual is the smallest in the Krylov
space of so many products.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional

from bissl_zoo.data.views import two_views
from bissl_zoo.hypergradient import CurvatureOperator, GaussNewtonOperator, GraphOperator
from bissl_zoo.hypergradient.solver import power_of_two
from bissl_zoo.registry import build_backbone, build_pretext

DAMPINGS = (30.0, 10.0, 3.0, 1.0, 0.5)


class Batches:
    """Random batches of two views `(B, 3, S, S)` and labels `(B,)` from an archive of JPEG streams."""

    def __init__(self, archive: Path, size: int, batch: int) -> None:
        with np.load(archive, allow_pickle=False) as arrays:
            self.stream, self.offsets, labels = (arrays[f"train_{part}"] for part in ("jpeg", "offsets", "labels"))
        self.labels, self.views, self.batch = labels.astype(np.int64), two_views(size=size), batch
        self.random = np.random.default_rng(0)

    def __next__(self) -> tuple[tuple[Tensor, ...], Tensor]:
        chosen = self.random.integers(0, len(self.labels), self.batch)
        ends = [self.stream[self.offsets[i] : self.offsets[i + 1]].tobytes() for i in chosen]
        views = [self.views(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in ends]
        return tuple(torch.stack(view) for view in zip(*views, strict=True)), torch.from_numpy(self.labels[chosen])


def explore(operator: GraphOperator, v: Tensor, products: int) -> tuple[list[list[str]], str]:
    """Return a line per damping, and a summary of the spectrum."""
    space = operator.prepare().subspace
    right = space.coordinates(v / power_of_two(v))
    direction, seconds = space.unexplored(right), []
    lines: dict[float, list[tuple[float, float, float]]] = {damping: [] for damping in DAMPINGS}
    for _ in range(products):
        start = time.perf_counter()
        space.explore(operator.hessian_product, direction)
        seconds.append(time.perf_counter() - start)
        for damping, line in lines.items():
            x, rest = space.minimal_residual(right, damping)
            target = functional.pad(right, (0, len(x) - len(right)))
            cosine = functional.cosine_similarity(x, target, dim=0)
            line.append((float(rest.norm() / right.norm()), float(cosine), float(x.norm() / right.norm())))
        direction = space.unexplored()
    values, _ = space.ritz_values()
    operator.release()
    rows = []
    for damping, line in lines.items():
        needed = next((n for n, (residual, _, _) in enumerate(line, 1) if residual <= 0.05), "-")
        residual, cosine, ratio = line[-1]
        rows.append([f"{damping:g}", str(needed), f"{residual:.2g}", f"{cosine:.3f}", f"{ratio:.3f}"])
    return rows, f"spectrum [{values[0]:.3g}, {values[-1]:.3g}], {np.median(seconds):.2f} s per product"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="NPZ", help="train_jpeg, train_offsets and train_labels")
    parser.add_argument("--steps", type=int, default=100, help="steps of SimCLR before")
    parser.add_argument("--products", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = Batches(args.archive, size=64, batch=32)
    backbone, tail = build_backbone(name="resnet18", zero_init_last=False).split("c5")
    method = build_pretext(name="simclr", backbone=backbone, tail=tail)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *method.parameters()], lr=1e-3, weight_decay=1e-4)
    head = torch.nn.Linear(512, 10)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
        sum(method.losses(backbone, next(batches)[0]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    fit = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(20):
        (images, _), labels = next(batches)
        with torch.no_grad():
            features = backbone.eval()(images)["c5"].mean(dim=(2, 3))
        functional.cross_entropy(head(features), labels).backward()
        fit.step()
        fit.zero_grad()
    (images, _), labels = next(batches)
    loss = functional.cross_entropy(head(backbone.train()(images)["c5"].mean(dim=(2, 3))), labels)
    parameters = list(backbone.parameters())
    v = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
    views, modules = next(batches)[0], (backbone, method)
    operators = {
        "Gauss-Newton": GaussNewtonOperator(
            lambda: method.outputs(backbone, views),
            lambda outputs: sum(method.outer(outputs).values()),
            parameters,
            1.0,
            modules=modules,
        ),
        "Hessian": CurvatureOperator(
            lambda: sum(method.losses(backbone, views).values()), parameters, 1.0, modules=modules
        ),
    }
    for name, operator in operators.items():
        rows, summary = explore(operator, v, args.products)
        headers = ["damping", "products to 0.05", f"residual after {args.products}", "cos(x, v)", "|x|/|v|"]
        print(f"\n{name}: {summary}\n\n{tabulate(rows, headers, 'github', disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
