"""Data sets by name.

Importing this package registers `voc_detection`, `coco_detection`, `image_folder`, `shards`, `digit_scenes` and the
classification sets of `classification_sets.py`.
"""

from bissl_zoo.data.datasets.catalog import datasets_root, load_image, require_folder
from bissl_zoo.data.datasets.classification_sets import ClassificationSet, register_classification_set
from bissl_zoo.data.datasets.coco import COCODetection
from bissl_zoo.data.datasets.digit_scenes import DigitScenes
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.datasets.voc import VOC_CLASSES, VOCDetection
from bissl_zoo.data.shards import ShardDataset

__all__ = [
    "VOC_CLASSES",
    "COCODetection",
    "ClassificationSet",
    "DigitScenes",
    "ImageFolder",
    "ShardDataset",
    "VOCDetection",
    "datasets_root",
    "load_image",
    "register_classification_set",
    "require_folder",
]
