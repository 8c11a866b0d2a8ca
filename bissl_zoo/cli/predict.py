"""Predict images with a fine-tuned model; write the results, and the images with them drawn.

bissl predict runs/a photos/ --output out/
bissl predict zoo:resnet18.simclr_bissl_trash photo.jpg
bissl predict runs/a photos/ --output out/ --format coco --threshold 0.05 --no-drawings

MODEL is a run directory, a folder of Model.save, or zoo:NAME. Without --output the results are printed, one JSON object
per image. `json` writes predictions.json, a list of the same objects; `coco` writes coco.json, which holds images,
categories and boxes with their scores, for detectors. `drawn/` has the file names of the images.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ConfigError, DatasetError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser.add_argument("model", metavar="MODEL", help="a run directory, a saved model, or zoo:NAME")
    parser.add_argument("images", metavar="IMAGES", help="an image, or a folder of images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for results and drawn images")
    parser.add_argument("--format", choices=["json", "coco"], default="json", help="of the results (json)")
    parser.add_argument("--no-drawings", action="store_true", help="write no drawn images")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="X", help="minimum score (0.5)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (16)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, faster on GPUs")
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="FILE", help="register the model's own task"
    )
    parser.add_argument("--zoo", metavar="LOCATION", help="of zoo:NAME; default: $BISSL_ZOO")
    args = parser.parse_args(argv)
    if args.output is None and args.format == "coco":
        parser.error("--format coco needs --output")
    return args


def run(args: argparse.Namespace) -> None:
    """Write or print the predictions."""
    from bissl_zoo.engine.checks import import_parts
    from bissl_zoo.files import write_atomically
    from bissl_zoo.model import load_model
    from bissl_zoo.progress.display import console

    with console():
        for file in args.imports:
            import_parts(file)
        model = load_model(args.model, zoo=args.zoo, device=None if args.device == "auto" else args.device)
        root = Path(args.images)
        if not root.exists():
            raise DatasetError(f"There is no image or folder {root}.")
        results = []
        for source, image, prediction in model.stream(args.images, args.batch_size, args.bf16, skip=root.is_dir()):
            if image is None:
                continue
            size = {"width": image.width, "height": image.height}
            results.append({"image": str(source), **size, **model.task.describe(prediction, args.threshold)})
            if args.output is None:
                print(json.dumps(results[-1], ensure_ascii=False), flush=True)
            elif not args.no_drawings:
                name = os.path.relpath(source, root) if root.is_dir() else root.name
                drawn = args.output / "drawn" / name
                drawn.parent.mkdir(parents=True, exist_ok=True)
                model.draw_prediction(image, prediction, args.threshold).save(drawn)
    if args.output is not None:
        file = args.output / ("coco.json" if args.format == "coco" else "predictions.json")
        content = coco(results, model.classes) if args.format == "coco" else results
        write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(results)} images  {file}")


def coco(results: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Return detections in COCO's format: images, categories, and annotations with `score`; ids count from 1.

    Raises:
        ConfigError: the predictions have no boxes.
    """
    if any("boxes" not in result for result in results):
        raise ConfigError("--format coco is for detectors: these predictions have no boxes. Use --format json.")
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images = [
        {"id": number, "file_name": result["image"], "width": result["width"], "height": result["height"]}
        for number, result in enumerate(results, start=1)
    ]
    annotations = []
    for image, result in zip(images, results, strict=True):
        for (x0, y0, x1, y1), label, score in zip(result["boxes"], result["labels"], result["scores"], strict=True):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": image["id"], "category_id": ids[label], **box, "score": score}
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
