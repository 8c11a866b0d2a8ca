"""The classification sets of the papers by name: `dataloader = dict(pretext=..., **loaders("food101"))`."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset


def loaders(name, train="trainval", test="test", batch_size=256, num_workers=8, **arguments):
    """The loaders `train` and `test` of a set, each of one of its splits.

    To tune on images that the test never sees: `train="train", test="val"`. Further arguments are those of the set:
    `val_fraction`, `seed`, `root`, `partition`, `fold`, `difficult`.
    """
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
    )


def unlabelled(name, split="trainval", batch_size=1024, num_workers=16, **arguments):
    """A loader of the images of a set without their labels, for a pretext method."""
    return L(build_train_loader)(
        dataset=L(build_dataset)(name=name, split=split, labelled=False, **arguments),
        batch_size=batch_size,
        num_workers=num_workers,
    )
