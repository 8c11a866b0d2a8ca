"""Check that every pretext method learns: kNN accuracy before and after a few minutes on CIFAR-10.

    export BISSL_ZOO_DATASETS=/tmp/datasets
    python benchmarks/pretext_methods.py --unpack cifar10_jpeg.npz    # once; writes cifar10/{train,test}/<class>/*.jpg
    OMP_NUM_THREADS=1 python benchmarks/pretext_methods.py --output runs/pretext_methods

Each run is the pretrain stage on unlabelled images of the training set, with the method's shared config and the changes
of `METHODS`. kNN classifies the embeddings of test images by those of labelled training images, as tools/probe.py, for

    trained   the backbone at the end of the run
    random    the initial backbone in eval mode, with initial batch-norm statistics
    settled   the initial backbone with measured batch-norm statistics, as the trained one has

The least gain is the smallest difference of trained and random over the seeds. The metrics of finished runs are stored
in the output folder together with their settings, and are not measured again.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import load_config
from bissl_zoo.data.datasets.catalog import datasets_root
from bissl_zoo.engine.features import CentralCrops, extract_features, load_frozen, sample_indices
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.runner import run
from bissl_zoo.evaluation import knn_accuracy
from bissl_zoo.evaluation.probes import effective_rank
from bissl_zoo.registry import build_backbone, build_dataset

FOLDER = dict(name="image_folder", root="cifar10")
SIZE, UNLABELLED, LABELLED = 32, 10_000, {"train": 5_000, "test": 2_000}
RESNET = dict(name="resnet18", channels=[16, 32, 64, 128], output_stride=16, zero_init_last=False)
VIT = dict(name="vit_tiny_patch16_224", patch_size=8, img_size=SIZE, class_token=False, global_pool="avg", depth=4)
# weaker than in the papers, for short training: no blur, no solarization, no change of hue
VIEWS = dict(size=SIZE, aspect_ratio=[3 / 4, 4 / 3], jitter=[0.4, 0.4, 0.4, 0.0], grayscale_probability=0.1)
TWO = dict(VIEWS, crop_scale=[0.2, 1.0], blur_probability=[0.0] * 2, solarize_probability=[0.0] * 2)
CROPS = dict(VIEWS, local_size=16, local_crops=2, blur_probability=[0.0] * 3, solarize_probability=[0.0] * 3)


@dataclass(frozen=True)
class Recipe:
    """Changes to `configs/common/pretext` for one method: heads for a small network and a short run."""

    pretext: dict[str, Any]
    views: dict[str, Any] = field(default_factory=lambda: TWO)
    backbone: dict[str, Any] = field(default_factory=lambda: RESNET)
    lr: float = 2e-3
    batch_size: int = 64
    steps: int = 300


STATES = ("settled", "random", "trained")
SLOW = dict(lr=5e-4, batch_size=32)  # with the learning rate of the others, outputs of DINO collapsed to uniform
METHODS = {
    "simclr": Recipe(dict(projector=[512, 128], temperature=0.2)),
    "byol": Recipe(dict(projector=[512, 128], predictor=[512, 128], decay=0.99), **SLOW, steps=700),
    "simsiam": Recipe(dict(projector=[512, 512], predictor=[128, 512]), **SLOW, steps=700),
    "moco_v2": Recipe(dict(projector=[512, 128], queue_length=1024, decay=0.99), lr=1e-3, steps=500),
    "moco_v3": Recipe(dict(projector=[512, 128], predictor=[512, 128])),
    "barlow_twins": Recipe(dict(projector=[512, 128]), steps=400),
    "vicreg": Recipe(dict(projector=[512, 512])),
    "dino": Recipe(dict(projector=[512, 64, 256], decay=0.99, teacher_temperature=0.02), CROPS, **SLOW, steps=1500),
    "simmim": Recipe({}, dict(size=SIZE, mask_patch=8), VIT, steps=800),
}


def config(method: str, recipe: Recipe, seed: int, folder: str) -> DictConfig:
    """Return the config of one run."""
    cfg = load_config("quickstart/digit_scenes_det.py")
    cfg.pretext = load_config(f"common/pretext/{method}.py").pretext
    cfg.pretext.update(recipe.pretext)
    cfg.pretext.augmentation.update(recipe.views)
    cfg.backbone = L(build_backbone)(**recipe.backbone)
    cfg.bilevel.shared_stage = None
    cfg.dataloader.pretext.update(batch_size=recipe.batch_size, num_workers=0)
    cfg.dataloader.pretext.dataset = L(build_dataset)(**FOLDER, split="train", labelled=False, limit=UNLABELLED)
    cfg.optimizer.pretrain.lr = recipe.lr
    cfg.pretrain.steps = recipe.steps
    cfg.train.update(stages=["pretrain"], seed=seed, output_dir=folder, device="cpu", log_period=50)
    cfg.train.publish.name = None
    return cfg


def trained(method: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train one run and return the metrics of its backbone."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(config(method, recipe, seed, folder), f"benchmark of {method}")
        seconds = time.perf_counter() - began
        return {"trained": measure(load_frozen(folder).model), "seconds": seconds}


def untrained(backbone: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the metrics of the initial backbone of a seed, without and with measured batch-norm statistics."""
    seed_everything(seed)  # as the stage does before it builds the network
    model = build_backbone(**backbone).model.eval()
    metrics = {"random": measure(model)}
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in DataLoader(crops("train"), batch_size=250):
            model.train()(batch[0])
    return {**metrics, "settled": measure(model.eval())}


def measure(model: nn.Module) -> dict[str, float]:
    """Return kNN accuracy and effective rank of the pooled embeddings of a frozen network."""
    (train, labels), (test, truth) = (
        extract_features(model, crops(split), torch.device("cpu"), batch_size=250) for split in LABELLED
    )
    return {"knn": knn_accuracy(train, labels, test, truth)["top1"], "rank": effective_rank(train)}


@cache
def crops(split: str) -> list[tuple[Tensor, int]]:
    """Return labelled images as network inputs; cached, since every run uses them."""
    images = build_dataset(**FOLDER, split=split)
    chosen = CentralCrops(images, sample_indices(len(images), LABELLED[split], seed=0), SIZE)
    return [chosen[position] for position in range(len(chosen))]


def cached(file: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `compute`, from `file` if it was written with the same settings."""
    if file.is_file() and (stored := json.loads(file.read_text())).pop("settings") == settings:
        return stored
    result = compute()
    file.write_text(json.dumps({"settings": settings, **result}, indent=2))
    return result


def metrics_of(method: str, seed: int, output: Path) -> dict[str, Any]:
    """Return all metrics of one run."""
    recipe, shared = METHODS[method], {"images": [UNLABELLED, *LABELLED.values()], "seed": seed}
    files = [output / f"{name}_{seed}.json" for name in (method, f"untrained_{recipe.backbone['name']}")]
    after = cached(files[0], asdict(recipe) | shared, lambda: trained(method, recipe, seed))
    before = cached(files[1], recipe.backbone | shared, lambda: untrained(recipe.backbone, seed))
    return after | before


def row(method: str, runs: list[dict[str, Any]]) -> list[Any]:
    """Return one row of the table."""
    cells: list[Any] = [method]
    for state in STATES:
        values = [100 * result[state]["knn"] for result in runs]
        cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if values[1:] else 0:.1f}")
    least_gain = min(result["trained"]["knn"] - result["random"]["knn"] for result in runs)
    ranks = [statistics.mean(result[state]["rank"] for result in runs) for state in ("random", "trained")]
    seconds = statistics.mean(result["seconds"] for result in runs)
    return [*cells, f"{100 * least_gain:+.1f}", f"{ranks[0]:.0f} to {ranks[1]:.0f}", f"{seconds:.0f}"]


def unpack(archive: Path) -> None:
    """Write the images of an npz of JPEG streams (`train_jpeg`, `train_offsets`, `train_labels`, ...) by class."""
    with np.load(archive, allow_pickle=False) as arrays:
        classes = [str(name) for name in arrays["classes"]]
        for split in ("train", "test"):
            stream, offsets, labels = (arrays[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
            for number, label in enumerate(labels):
                folder = datasets_root() / FOLDER["root"] / split / classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:05}.jpg").write_bytes(stream[offsets[number] : offsets[number + 1]].tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unpack", type=Path, metavar="NPZ", help="only write the folders of the data set")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/pretext_methods"), help="folder of the metrics")
    args = parser.parse_args()
    if args.unpack:
        return unpack(args.unpack)
    args.output.mkdir(parents=True, exist_ok=True)
    pixels = cached(args.output / "pixels.json", {"images": list(LABELLED.values())}, lambda: measure(nn.Flatten()))
    rows = [row(method, [metrics_of(method, seed, args.output) for seed in args.seeds]) for method in args.methods]
    print(tabulate(rows, ["method", *STATES, "least gain", "effective rank", "s"], "github", disable_numparse=True))
    print(f"\nkNN of the pixels themselves: {100 * pixels['knn']:.1f}")


if __name__ == "__main__":
    main()
