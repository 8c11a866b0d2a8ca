"""The tiny digit scenes in the layouts that the pages of the documentation speak of."""

import json
import re
import shutil
from pathlib import Path

from bissl_zoo.data.datasets.voc import read_annotation


def scenes_as_voc(scenes: Path, folder: Path, years=("VOC2007",), classes=None) -> None:
    """The tiny digit scenes as a devkit of one's own, with digits called by VOC's names where `classes` are VOC's."""
    source = next(scenes.glob("*/VOCdevkit/VOC2007"))
    for year in years:
        target = folder / "VOCdevkit" / year
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.copy(target / "ImageSets/Main/train.txt", target / "ImageSets/Main/trainval.txt")
        for file in target.glob("Annotations/*.xml") if classes else ():
            text = re.sub(
                r"<name>(\d)</name>", lambda found: f"<name>{classes[int(found[1])]}</name>", file.read_text()
            )
            file.write_text(text)


def scenes_as_coco(scenes: Path, folder: Path) -> None:
    """The tiny digit scenes as COCO has them: a folder of images, and a JSON file per split."""
    devkit = next(scenes.glob("*/VOCdevkit/VOC2007"))
    shutil.copytree(devkit / "JPEGImages", folder / "images")
    (folder / "annotations").mkdir()
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    for split in ("train", "test"):
        images, annotations = [], []
        for number, name in enumerate((devkit / f"ImageSets/Main/{split}.txt").read_text().split()):
            scene = read_annotation(devkit / "Annotations" / f"{name}.xml")
            images.append({"id": number, "file_name": f"{name}.jpg", "width": scene.width, "height": scene.height})
            for label, (left, top, right, bottom) in zip(scene.names, scene.boxes, strict=True):
                box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
                one = {"id": len(annotations), "image_id": number, "category_id": int(label), "bbox": box, "iscrowd": 0}
                annotations.append(one)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
