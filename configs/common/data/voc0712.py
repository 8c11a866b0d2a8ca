"""VOC07+12 detection: VOC2007 trainval and VOC2012 trainval to train, VOC2007 test to test.

An image that cannot be decoded is replaced in training and counted; `+dataloader.train.on_bad=error` stops instead. It
stops an evaluation; `+dataloader.test.on_bad=skip` leaves it out instead.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset

train = L(build_train_loader)(
    dataset=L(build_dataset)(name="voc_detection", splits=["2007_trainval", "2012_trainval"], classes="voc"),
    batch_size=16,
    num_workers=8,
)
test = L(build_test_loader)(
    dataset=L(build_dataset)(name="voc_detection", splits=["2007_test"], classes="voc"), batch_size=16, num_workers=8
)
