"""Evaluate a frozen backbone on labelled images by weighted kNN and a linear classifier.

bissl probe zoo:resnet18.simclr --train-folder imagenet/train --test-folder imagenet/val --linear
bissl probe backbone.safetensors --architecture resnet50 --config-file configs/mine.py
bissl probe runs/pretrained --train-folder flowers/train --test-folder flowers/test --k 200 --json

BACKBONE is a zoo entry, a .safetensors file with timm's parameter names, or a run directory. A folder holds one folder
of images per class; a config's data sets are its dataloader.train and dataloader.test. The central crop of an image is
7/8 of its shorter side, normalised like the backbone's training images.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bissl_zoo.errors import DatasetError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from bissl_zoo.engine.features import FrozenBackbone


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; other words than BACKBONE and options are overrides of the config."""
    parser.add_argument("backbone", metavar="BACKBONE", help="zoo:NAME, a .safetensors file, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config, as in train_net.py")
    parser.add_argument("--architecture", metavar="NAME", help="timm name, for a file without one")
    parser.add_argument("--config-file", metavar="FILE", help="take the data sets of this config")
    parser.add_argument("--train-folder", type=Path, metavar="DIR", help="training images in class folders")
    parser.add_argument("--test-folder", type=Path, metavar="DIR", help="test images in class folders")
    parser.add_argument("--images", type=int, metavar="N", help="largest number of images of each set; default: all")
    parser.add_argument("--size", type=int, metavar="S", help="side of the crop; default: stored value or 224")
    for statistic in ("mean", "std"):
        parser.add_argument(f"--{statistic}", type=float, nargs=3, metavar="X", help="of RGB in [0, 1], if not stored")
    parser.add_argument("--k", type=int, default=20, help="neighbours of the kNN classifier (20)")
    parser.add_argument(
        "--temperature", type=float, default=0.07, metavar="T", help="temperature of the neighbours' votes (0.07)"
    )
    parser.add_argument("--linear", action="store_true", help="also train a linear classifier")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="epochs of the linear classifier (100)")
    parser.add_argument("--seed", type=int, default=0, help="of what is sample_indices (0)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="batch size (128)")
    parser.add_argument("--num-workers", type=int, default=4, metavar="N", help="loader processes (4)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_intermixed_args(argv)
    if (args.train_folder is None) != (args.test_folder is None):
        parser.error("--train-folder and --test-folder go together")
    if (args.train_folder is None) == (args.config_file is None):
        parser.error("give --config-file, or --train-folder and --test-folder")
    if args.overrides and args.config_file is None:
        parser.error(f"overrides without a --config-file: {' '.join(args.overrides)}")
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    for name in ("images", "size", "k", "epochs", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return args


def run(args: argparse.Namespace) -> int:
    """Load, extract, evaluate, print."""
    from bissl_zoo.engine.features import load_frozen
    from bissl_zoo.engine.launch import choose_device
    from bissl_zoo.evaluation import knn_accuracy, linear_probe

    backbone = load_frozen(args.backbone, args.architecture)
    backbone.model.to(choose_device(args.device))
    sets = open_sets(args)
    size = args.size or backbone.pixels.get("input_size", [224])[-1]
    width = backbone.width(size)
    parts = embed(backbone, sets, size, args)
    info = {"backbone": backbone.source, "architecture": backbone.architecture, "features": width, "size": size}
    info |= {"train_images": len(parts[1]), "test_images": len(parts[3]), "classes": len(sets["train"].classes)}
    knn = knn_accuracy(*parts, args.k, args.temperature)
    probes: dict[str, Any] = {"knn": {"k": args.k, "temperature": args.temperature, **knn}}
    if args.linear:
        linear = linear_probe(*parts, epochs=args.epochs, seed=args.seed)
        probes["linear"] = {"learning_rate": linear.learning_rate, "epochs": args.epochs, **linear.metrics}
    print(json.dumps({**info, **probes}) if args.json else report(info, probes))
    return 0


def open_sets(args: argparse.Namespace) -> "dict[str, Dataset]":
    """Return the data sets `train` and `test`, in this order, with the same classes."""
    from bissl_zoo.data import ImageFolder
    from bissl_zoo.engine.build import build_datasets
    from bissl_zoo.engine.checks import open_config

    if args.config_file:
        sets = build_datasets(open_config(args.config_file, args.overrides), {"train", "test"})
    else:
        train = ImageFolder(str(args.train_folder.absolute()))
        sets = {"train": train, "test": ImageFolder(str(args.test_folder.absolute()), classes=train.classes)}
    for role, dataset in sets.items():
        if not isinstance(target := dataset[0][1], int):
            raise DatasetError(
                f"The {role} set of {args.config_file} has targets of type {type(target).__name__}; probes need class "
                "labels. Give a classification config, or --train-folder and --test-folder."
            )
    return sets


def embed(frozen: "FrozenBackbone", sets: "dict[str, Dataset]", size: int, args: argparse.Namespace) -> "list[Tensor]":
    """Return embeddings and labels of the training set, then of the test set, on the device of the network."""
    from bissl_zoo.engine.features import extract_features, sample_indices

    device, parts = next(frozen.model.parameters()).device, []
    for role, dataset in sets.items():
        chosen = sample_indices(len(dataset), args.images or len(dataset), args.seed)
        crops = frozen.central_crops(dataset, chosen, size, args.mean, args.std)
        parts += extract_features(frozen.model, crops, device, args.batch_size, args.num_workers, role)
    return [part.to(device) for part in parts]


def report(info: dict[str, Any], probes: dict[str, dict[str, Any]]) -> str:
    """Return a text with the backbone, the data, and a line per probe."""
    rows = []
    for name, probe in probes.items():
        settings = [f"{key.replace('_', ' ')} {probe[key]:g}" for key in probe if not key.startswith(("top", "mean_"))]
        rows.append([name, ", ".join(settings), *(probe.get(key) for key in ("top1", "top5", "mean_per_class"))])
    head = (
        f"{info['backbone']}: {info['architecture']}, {info['features']} features of {info['size']} pixels\n"
        f"{info['train_images']} training and {info['test_images']} test images of {info['classes']} classes\n\n"
    )
    return head + tabulate(rows, ["probe", "settings", "top-1", "top-5", "mean per class"], floatfmt=".4f")
