"""The classification sets of the papers by name: `dataloader = dict(pretext=..., **loaders("food101"))`.

An image that does not decode is replaced in training and counted, or ends it by `+dataloader.train.on_bad=error`; it
ends an evaluation, or is left out of it by `+dataloader.test.on_bad=skip`.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset


def loaders(name, train=None, test="test", batch_size=256, num_workers=8, val=None, **arguments):
    """The loaders `train` and `test` of a set, each of one of its splits, and `val` where a split is named for it.

    `val="val"` is what `finetune.early_stopping` chooses weights by; training images are then the split "train", which
    shares none with it, and otherwise "trainval". To tune on images that the test never sees: `train="train",
    test="val"`. Further arguments are those of the set: `val_fraction`, `seed`, `root`, `partition`, `fold`,
    `difficult`.
    """
    train = train or ("train" if val else "trainval")
    validation = dict(
        val=L(build_test_loader)(
            dataset=L(build_dataset)(name=name, split=val, **arguments),
            batch_size=batch_size,
            num_workers=num_workers,
        )
    )
    return dict(
        train=L(build_train_loader)(
            dataset=L(build_dataset)(name=name, split=train, **arguments),
            batch_size=batch_size,
            num_workers=num_workers,
        ),
        test=L(build_test_loader)(
            dataset=L(build_dataset)(name=name, split=test, **arguments),
            batch_size=batch_size,
            num_workers=num_workers,
        ),
        **(validation if val else {}),
    )


def unlabelled(name, split="trainval", batch_size=1024, num_workers=16, **arguments):
    """A loader of the images of a set without their labels, for a pretext method."""
    return L(build_train_loader)(
        dataset=L(build_dataset)(name=name, split=split, labelled=False, **arguments),
        batch_size=batch_size,
        num_workers=num_workers,
    )
