"""COCO 2017 detection: train2017 to train, val2017 to test.

An image that cannot be decoded is replaced in training and counted; `+dataloader.train.on_bad=error` stops instead. It
stops an evaluation; `+dataloader.test.on_bad=skip` leaves it out instead.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset

train = L(build_train_loader)(
    dataset=L(build_dataset)(
        name="coco_detection",
        root="coco",
        annotations="annotations/instances_train2017.json",
        images="train2017",
        on_bad_annotation="skip",  # two of its 860,001 boxes have no height; they are counted in the log
    ),
    batch_size=16,
    num_workers=8,
)
test = L(build_test_loader)(
    dataset=L(build_dataset)(
        name="coco_detection", root="coco", annotations="annotations/instances_val2017.json", images="val2017"
    ),
    batch_size=16,
    num_workers=8,
)
