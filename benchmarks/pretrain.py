"""Compare images per second of the pretrain stage (SimCLR), a bare loop and lightly, interleaved in one run.

    python benchmarks/pretrain.py
    python benchmarks/pretrain.py --architecture resnet50 --size 224 --batch 256 --workers 8 --amp --options

    memory, bare      a plain loop with the same networks, loss, optimizer and clipping on views in memory
    memory, stage     the stage on the same views
    files, bare       the plain loop with torch's DataLoader and the same augmentation of JPEG files
    files, stage      the stage with its loader on the same files
    files, lightly    lightly's SimCLR example for plain PyTorch: its transform, projection head, loss and optimizer
    views             no training: augmentation of JPEG files with the same number of workers

`--options` adds the stage on views in memory with each of the options that may be faster on a GPU. Every variant uses
the same batch and the same number of workers. A round is a number of steps of each variant; the first ones are not
counted, since an idle loader has prefetched batches. Ratios are medians of the ratios round by round.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.data.samples import TransformedDataset, to_device
from bissl_zoo.data.views import two_views
from bissl_zoo.engine.build import ViewsOnly
from bissl_zoo.engine.stages.pretrain import PretrainTrainer, compile_backbones
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.registry import build_backbone, build_pretext

DISCARDED = 3
RATIOS = [
    ("memory, stage", "memory, bare", 0.95),
    ("files, stage", "files, bare", None),
    ("files, stage", "files, lightly", 1.0),
]


def write_photographs(folder: Path, count: int) -> Path:
    """Write crops of two photographs, 400 x 300 pixels, as JPEG files."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        photo = photos[number % len(photos)]
        y, x = (int(rng.integers(side - length)) for side, length in zip(photo.shape, (300, 400), strict=False))
        Image.fromarray(photo[y : y + 300, x : x + 400]).save(folder / "images" / f"{number:05d}.jpg", quality=90)
    return folder


class Bench:
    """Data, sizes and device that the variants share."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.amp = torch.bfloat16 if args.amp else None
        self.dataset = ImageFolder(str(folder.absolute()), "images", labelled=False)
        self.views = two_views(size=args.size)
        batch = next(iter(self.loader()))
        self.ready = to_device(batch, self.device)

    def loader(self, workers: int = 0) -> DataLoader:
        """Return the project's loader."""
        transform = ViewsOnly(self.views)
        return build_train_loader(self.dataset, self.args.batch, transform, num_workers=workers)

    def plain_loader(self, transform: Callable) -> DataLoader:
        """Return torch's loader, as its users write it."""
        workers = self.args.workers
        samples = TransformedDataset(self.dataset, transform)
        return DataLoader(samples, self.args.batch, True, num_workers=workers, persistent_workers=True, drop_last=True)

    def on_device(self, loader: DataLoader) -> Iterator[tuple[Tensor, ...]]:
        """Yield endless batches on the device."""
        while True:
            for batch in loader:
                yield to_device(batch, self.device)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Return trunk and pretext method, the same each time."""
        torch.manual_seed(0)
        whole = build_backbone(name=self.args.architecture)
        trunk, tail = whole.split(whole.stages[-1])
        method = build_pretext(name="simclr", backbone=trunk, tail=tail)
        return trunk.to(self.device).train(), method.to(self.device).train()

    def stage(self, batches: Iterator, channels_last: bool = False, compiled: bool = False) -> Callable[[], None]:
        """Return a step of the stage."""
        trunk, method = self.networks()
        if channels_last:
            trunk, method = (module.to(memory_format=torch.channels_last) for module in (trunk, method))
        if compiled:
            compile_backbones(trunk, method)
        parameters = [*trunk.parameters(), *method.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        constant = LRMultiplier(ConstantParamScheduler(1.0))
        size = self.args.batch
        level = Level("pretrain", trunk, method, optimizer, batches, constant, 10**6, 10.0, self.amp, batch_size=size)
        return PretrainTrainer(level).run_step

    def bare(self, batches: Iterator) -> Callable[[], None]:
        """Return a step of a hand-written loop with the clipping of the stage."""
        trunk, method = self.networks()
        parameters = [*trunk.parameters(), *method.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

        def step() -> None:
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                loss = method.losses(trunk, next(batches))["nt_xent"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimizer.step()
            loss.item()

        return step

    def lightly(self) -> Callable[[], None]:
        """Return a step of lightly's example with the measured network."""
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        torch.manual_seed(0)
        backbone = build_backbone(name=self.args.architecture).model
        model = nn.Sequential(backbone, SimCLRProjectionHead(backbone.num_features, 256, 256)).to(self.device).train()
        criterion = NTXentLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
        batches = self.on_device(self.plain_loader(ViewsOnly(SimCLRTransform(input_size=self.args.size))))

        def step() -> None:
            first, second = next(batches)
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                loss = criterion(model(first), model(second))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

        return step

    def variants(self) -> dict[str, Callable[[], None]]:
        """Return the steps by name."""
        memory = itertools.repeat(self.ready)
        views = self.on_device(self.loader(self.args.workers))
        variants = {
            "memory, bare": self.bare(memory),
            "memory, stage": self.stage(memory),
            "files, bare": self.bare(self.on_device(self.plain_loader(ViewsOnly(self.views)))),
            "files, stage": self.stage(self.on_device(self.loader(self.args.workers))),
            "files, lightly": self.lightly(),
            "views": lambda: next(views),
        }
        if self.args.options:
            variants["memory, channels_last"] = self.stage(memory, channels_last=True)
            variants["memory, compile"] = self.stage(memory, compiled=True)
            variants["memory, both"] = self.stage(memory, channels_last=True, compiled=True)
        return variants

    def speed(self, step: Callable[[], None]) -> float:
        """Return the images per second of one round."""
        for _ in range(DISCARDED):
            step()
        self._wait()
        start = time.perf_counter()
        for _ in range(self.args.steps):
            step()
        self._wait()
        return self.args.steps * self.args.batch / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--options", action="store_true", help="also channels_last and torch.compile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, write_photographs(Path(folder), args.images))
        variants = bench.variants()
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in tqdm(range(args.rounds), unit="round"):
            for name, step in variants.items():
                speeds[name].append(bench.speed(step))
    print(f"{args.architecture}, {args.size} px, batch {args.batch}, {args.workers} workers, {bench.device}")
    print(
        tabulate(
            [[n, statistics.median(s), min(s), max(s)] for n, s in speeds.items()],
            ["images/s", "median", "min", "max"],
            floatfmt=".1f",
        )
    )
    pairs = RATIOS + [
        (name, "memory, stage", None) for name in speeds if name.startswith("memory, c") or "both" in name
    ]
    rows = []
    for name, other, aim in pairs:
        ratios = [a / b for a, b in zip(speeds[name], speeds[other], strict=True)]
        rows.append([f"{name} / {other}", statistics.median(ratios), min(ratios), max(ratios), aim])
    print(tabulate(rows, ["ratio", "median", "min", "max", "aim"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
