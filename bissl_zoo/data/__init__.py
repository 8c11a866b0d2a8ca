"""Data sets by name; importing this package registers `voc_detection`, `image_folder`, `shards` and `digit_scenes`."""

from bissl_zoo.data.catalog import datasets_root, load_image, require_folder
from bissl_zoo.data.digit_scenes import DigitScenes
from bissl_zoo.data.folder import ImageFolder
from bissl_zoo.data.shards import ShardDataset
from bissl_zoo.data.voc import VOC_CLASSES, VOCDetection

__all__ = [
    "VOC_CLASSES",
    "DigitScenes",
    "ImageFolder",
    "ShardDataset",
    "VOCDetection",
    "datasets_root",
    "load_image",
    "require_folder",
]
