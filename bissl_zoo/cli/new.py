"""Look at a folder of labelled images and write a config that trains on it.

bissl new --data photos                            # class folders, VOC or COCO; writes photos.py
bissl new --data photos --unlabelled more_photos --output mine.py
bissl new --data photos --weights backbone.safetensors --backbone resnet50

The schedule takes minutes on a CPU: a first try. `bissl data --check DIR` opens every file of the folder first.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ConfigError, DatasetError

#: words in the names of splits
TRAIN, TEST = ("trainval", "train"), ("test", "val", "valid", "validation")
#: side of pretext views and of classified images; a multiple of 14 for patches of 14 pixels
VIEW_SIZE = 96
#: shorter side of images for detection, and the quantiles of the boxes that become anchors
MIN_SIZE, ANCHOR_QUANTILES = 196, (0.1, 0.35, 0.65, 0.9)
SHARE_ALL = "bilevel.shared_stage = None  # the levels share the whole backbone"


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="labelled images")
    parser.add_argument("--unlabelled", type=Path, metavar="DIR", help="images for the pretext method; default: --data")
    parser.add_argument("--weights", metavar="SOURCE", help="weights to start from, as train.init; default: pretrain")
    parser.add_argument("--backbone", metavar="NAME", help="timm's name; default: that of timm:NAME, or resnet18")
    parser.add_argument("--output", type=Path, metavar="FILE", help="config to write; default: NAME_OF_DATA.py")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the config and print how to run it."""
    name = re.sub(r"\W+", "_", args.data.absolute().name).strip("_") or "mine"
    output = args.output or Path(f"{name}.py")
    if output.suffix != ".py":
        raise ConfigError(f"--output {output}: the name of a config ends in .py.")
    text = config_text(name, args.data, args.unlabelled, args.weights, args.backbone)
    try:
        with open(output, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot write this file ({error.strerror}).") from error
    print(f"{text}\nwrote {output}; next\n    bissl train --config-file {output} --dry-run")


def config_text(
    name: str, data: Path, unlabelled: Path | None = None, weights: str | None = None, backbone: str | None = None
) -> str:
    """Return a config that trains on the labelled images in `data`.

    Raises:
        DatasetError: the layout is unknown, labels are missing, or there are no images to test on.
    """
    import timm

    from bissl_zoo.data.prepare.check import splits_of
    from bissl_zoo.registry import build_dataset

    splits = splits_of(data.absolute())
    roles = roles_of(splits, data)
    sets = {role: build_dataset(**arguments) for role, arguments in roles.items()}
    train = sets["train"]
    classes = sorted({label for dataset in sets.values() for label in dataset.classes})
    for role, dataset in sets.items():
        if not getattr(dataset, "left_out", None):
            roles[role].pop("on_bad_annotation", None)
        if len(dataset.classes) < len(classes):
            roles["train"]["classes"] = roles["test"]["classes"] = classes
    source = next((a for a in splits.values() if a.get("labelled") is False), roles["train"])
    if unlabelled:
        source = {"name": "image_folder", "root": str(unlabelled.absolute()), "labelled": False}
    elif "part" not in source:  # which is drawn by class
        source = {key: value for key, value in source.items() if key != "classes"} | {"labelled": False}
    boxes = hasattr(train, "boxes")
    backbone, arguments = backbone_of(weights, backbone) if weights else (backbone, {})
    patch = int((re.findall(r"patch(\d+)", backbone or "") or [1])[0])
    size = arguments.get("img_size") or VIEW_SIZE + -VIEW_SIZE % patch
    if backbone and getattr(timm.get_pretrained_cfg(backbone), "fixed_input_size", False) and not boxes:
        arguments = {**arguments, "img_size": size}  # positions are resampled
    pretext_batch, train_batch = min(len(build_dataset(**source)), 64), min(len(train), 16)
    title = f"{len(classes)} classes of {'objects' if boxes else 'images'}, {len(train)} training images"
    lines = [
        f'"""BiSSL on {data.absolute().name}: {title}."""',
        "",
        "from bissl_zoo.config import LazyCall as L",
        "from bissl_zoo.configs.quickstart.digit_scenes_det import *  # lists every key with its value",
        *([] if boxes else ["from bissl_zoo.configs.common.downstream.classification import task"]),
        f"from bissl_zoo.registry import {'build_backbone, ' if backbone else ''}build_dataset",
        "",
        "# read without its labels",
        f"dataloader.pretext.dataset = {call('build_dataset', source)}",
        *(f"dataloader.{role}.dataset = {call('build_dataset', arguments)}" for role, arguments in roles.items()),
        f"dataloader.pretext.batch_size, dataloader.train.batch_size = {pretext_batch}, {train_batch}",
        f"pretext.augmentation.update(size={size}, crop_scale=[0.2, 1.0], flip_probability=0.5)",
        *(detection_lines(train) if boxes else [f"task.image_size = {size}", SHARE_ALL]),
        *([f"backbone = {call('build_backbone', {'name': backbone, **arguments})}  # any of timm"] if backbone else []),
        *(
            [f"train.init = {json.dumps(weights)}  # weights of the backbone", 'train.stages = ["bissl", "finetune"]']
            if weights
            else []
        ),
        f'train.output_dir, train.publish.name = "runs/{name}", "{backbone or "resnet18"}.simclr_bissl_{name}"',
        "# a first try of minutes; more steps of every stage give better models",
        "pretrain.steps, bilevel.alternations, finetune.steps = 100, 12, 300",
    ]
    return "\n".join(lines) + "\n"


def detection_lines(dataset: Any) -> list[str]:
    """Return the lines on image and box sizes, from the boxes of the training set."""
    import numpy as np

    shorter = np.median(dataset.sizes.min(axis=1))
    size = int(min(shorter, MIN_SIZE))
    boxes = dataset.boxes[~dataset.difficult]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    anchors = np.unique(np.rint(np.sqrt(np.quantile(areas, ANCHOR_QUANTILES)) * size / shorter).astype(int).clip(4))
    return [
        "# image size in pixels (shorter side, at most longer side), and anchors of the sizes of the boxes in it",
        f"task.update(min_size={size}, max_size={2 * size}, anchor_sizes={anchors.tolist()}, flip_probability=0.5)",
    ]


def roles_of(splits: Mapping[str, dict[str, Any]], data: Path) -> dict[str, dict[str, Any]]:
    """Return the arguments of `build_dataset` for train and test.

    Raises:
        DatasetError: no labels, no split for training, or none to test on.
    """
    labelled = {name: dict(a) for name, a in splits.items() if a.get("labelled", True)}

    def first(words: Sequence[str]) -> str | None:
        return next((name for word in words for name in labelled if word in re.findall("[a-z]+", name.lower())), None)

    if not labelled:
        raise DatasetError(f"{data} holds images without labels. Give labelled images, and these as --unlabelled.")
    train, test = next(iter(labelled)) if len(labelled) == 1 else first(TRAIN), first(TEST)
    if train is None:
        raise DatasetError(f"{data}: none of the splits {', '.join(labelled)} is called train.")
    if test not in (None, train):
        return {"train": labelled[train], "test": labelled[test]}
    if labelled[train]["name"] != "image_folder":
        raise DatasetError(
            f"{data} has one split, {train}. Divide it into train and test: other images are needed to test."
        )
    return {role: {**labelled[train], "part": part} for role, part in (("train", "train"), ("test", "val"))}


def backbone_of(weights: str, name: str | None) -> tuple[str, dict[str, Any]]:
    """Return the architecture of weights, and its arguments beyond timm's defaults.

    Args:
        name: the architecture, for a file that does not state it.
    """
    if weights.startswith("timm:"):
        return name or weights.removeprefix("timm:").partition(".")[0], {}
    from bissl_zoo.weights.load import read_weights

    stored = read_weights(weights, name)
    return stored.architecture, dict(stored.model_args)


def call(function: str, arguments: Mapping[str, Any]) -> str:
    """Return a lazy call of a function as code."""
    code = {key: json.dumps(value) if isinstance(value, (str, list)) else value for key, value in arguments.items()}
    return f"L({function})({', '.join(f'{key}={value}' for key, value in code.items())})"
