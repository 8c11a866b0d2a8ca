"""Data sets by name, their loaders and augmentations.

Names are imported on first use, since torch takes seconds to import. The data sets that `build_dataset` knows are in
the registry `bissl_zoo.registry.DATASETS`.
"""

import importlib
from typing import Any

_MODULES = {
    "ClassificationSet": "datasets.classification",
    "register_classification_set": "datasets.classification",
    "datasets_root": "datasets.catalog",
    "load_image": "datasets.catalog",
    "require_folder": "datasets.catalog",
    "COCODetection": "datasets.coco",
    "DigitScenes": "datasets.digit_scenes",
    "ImageFolder": "datasets.folder",
    "VOC_CLASSES": "datasets.voc",
    "VOCDetection": "datasets.voc",
    "ShardDataset": "shards",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
