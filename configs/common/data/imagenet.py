"""ImageNet-1k's training images without their labels, the pretext data of the papers.

An image that cannot be decoded is replaced and counted; `+dataloader.pretext.on_bad=error` stops instead.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.registry import build_dataset

pretext = L(build_train_loader)(
    dataset=L(build_dataset)(name="image_folder", root="imagenet/train", labelled=False),
    batch_size=1024,
    num_workers=16,
)
