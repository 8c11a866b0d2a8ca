"""The classification sets of the papers by name: `dataloader = dict(pretext=..., **loaders("food101"))`.

An image that cannot be decoded is replaced in training and counted; `+dataloader.train.on_bad=error` stops instead. It
stops an evaluation; `+dataloader.test.on_bad=skip` leaves it out instead.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset


def loaders(name, train=None, test="test", batch_size=256, num_workers=8, val=None, **arguments):
    """Return the loaders `train` and `test` of a data set, and `val` if a split is named for it.

    `finetune.early_stopping` selects weights on `val`; with `val="val"` the training split is "train", which is
    disjoint from it, otherwise "trainval". For a search without the test images: `train="train", test="val"`. Further
    arguments are those of the data set: `val_fraction`, `seed`, `root`, `partition`, `fold`, `difficult`.
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
    """Return a loader of the images of a data set without labels, for a pretext method."""
    return L(build_train_loader)(
        dataset=L(build_dataset)(name=name, split=split, labelled=False, **arguments),
        batch_size=batch_size,
        num_workers=num_workers,
    )
