"""Random shares and folds of labelled data sets."""

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.data import ImageFolder
from bissl_zoo.data.datasets.subsets import label_fraction, split_fold, without
from bissl_zoo.errors import DatasetError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    for name, count in {"cat": 20, "dog": 7, "owl": 1}.items():
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "pets" / name / f"{number}.png")
    return ImageFolder("pets")


class Boxes:
    """A detection set in the form that matters here: targets are no class indices."""

    classes = ["a", "b"]

    def __len__(self):
        return 40

    def target(self, index):
        return {"boxes": index, "image_id": index}

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4)), self.target(index)


def test_a_share_is_drawn_from_every_class_rounded_up(folder):
    part = label_fraction(folder, 0.25, seed=3)
    assert np.bincount([part.target(index) for index in range(len(part))]).tolist() == [5, 2, 1]
    assert part[0][1] == part.target(0) and part.classes == ["cat", "dog", "owl"]
    assert part[2][0].getpixel((0, 0)) == folder[int(part.indices[2])][0].getpixel((0, 0))


@pytest.mark.parametrize("dataset", ["folder", "boxes"])
def test_smaller_shares_are_contained_in_larger_ones_and_seeds_differ(dataset, folder):
    full = folder if dataset == "folder" else Boxes()
    parts = [set(label_fraction(full, fraction, seed=1).indices.tolist()) for fraction in (0.05, 0.25, 0.6, 1.0)]
    assert all(small < large for small, large in zip(parts, parts[1:], strict=False))
    assert parts[-1] == set(range(len(full)))
    assert parts[1] != set(label_fraction(full, 0.25, seed=2).indices.tolist())


def test_the_digest_is_that_of_the_chosen_samples(folder):
    digests = {label_fraction(folder, fraction, seed).digest() for fraction, seed in [(0.5, 0), (0.5, 1), (0.25, 0)]}
    assert len(digests) == 3 and label_fraction(folder, 0.5, 0).digest() in digests


@pytest.mark.parametrize("fraction", [0, 1.5, True, "5%"])
def test_a_share_outside_0_to_1_is_refused(fraction, folder):
    with pytest.raises(DatasetError, match="label_fraction"):
        label_fraction(folder, fraction, seed=0)


def test_each_sample_is_tested_in_one_fold_and_classes_are_distributed_evenly(folder):
    folds = [split_fold([folder, folder], 4, fold) for fold in range(4)]
    for train, test in folds:
        assert sorted([*train.indices, *test.indices]) == list(range(56))
        assert abs(np.bincount([test.target(i) for i in range(len(test))], minlength=3)[0] - 10) <= 1
    assert sorted(np.concatenate([test.indices for _, test in folds])) == list(range(56))
    train, test = folds[1]
    number = next(i for i in range(len(test)) if test.indices[i] >= 28)
    assert test.source(number) == folder.source(int(test.indices[number]) - 28)
    assert test[number][1] == folder.target(int(test.indices[number]) - 28)


def test_the_images_of_a_test_fold_are_left_out_of_an_unlabelled_pile(folder):
    _, test = split_fold([folder], 4, 1)
    pile = without(ImageFolder("pets", labelled=False), test)
    sources = [pile.source(index) for index in range(len(pile))]
    tested = {test.source(index) for index in range(len(test))}
    assert len(sources) == 28 - len(tested) and not tested & set(sources) and pile.classes is None
    assert pile[0][1] is None and without(folder, pile) is not folder and without(folder, Boxes()) is folder


def test_images_of_two_detection_sets_have_distinct_numbers():
    train, test = split_fold([Boxes(), Boxes()], 2, 0)
    assert [test.target(i)["image_id"] for i in range(len(test))] == list(range(40))
    assert {test[i][1]["boxes"] for i in range(len(test))} <= set(range(40)) and test.digest() != train.digest()


def test_targets_are_those_of_the_chosen_samples(folder):
    part = label_fraction(folder, 0.25, seed=3)
    assert part.targets.tolist() == [part.target(index) for index in range(len(part))] and part.targets.dtype == "int64"
    boxes = Boxes()
    boxes.target = lambda index: {"labels": torch.tensor([index, 1]), "difficult": torch.tensor([False, True])}
    chosen = label_fraction(boxes, 0.1, seed=0)
    assert chosen.targets.tolist() == chosen.indices.tolist()  # without the difficult objects
    assert label_fraction(Boxes(), 0.1, seed=0).targets is None
