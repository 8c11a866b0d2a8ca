"""Random shares of labelled data sets."""

import numpy as np
import pytest
from PIL import Image

from bissl_zoo.data import ImageFolder
from bissl_zoo.data.datasets.fraction import LabelFraction
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
        return {"boxes": index}

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4)), self.target(index)


def test_a_share_is_drawn_from_every_class_rounded_up(folder):
    part = LabelFraction(folder, 0.25, seed=3)
    assert np.bincount([part.target(index) for index in range(len(part))]).tolist() == [5, 2, 1]
    assert part[0][1] == part.target(0) and part.classes == ["cat", "dog", "owl"]
    assert part[2][0].getpixel((0, 0)) == folder[int(part.indices[2])][0].getpixel((0, 0))


@pytest.mark.parametrize("dataset", ["folder", "boxes"])
def test_smaller_shares_are_contained_in_larger_ones_and_seeds_differ(dataset, folder):
    full = folder if dataset == "folder" else Boxes()
    parts = [set(LabelFraction(full, fraction, seed=1).indices.tolist()) for fraction in (0.05, 0.25, 0.6, 1.0)]
    assert all(small < large for small, large in zip(parts, parts[1:], strict=False))
    assert parts[-1] == set(range(len(full)))
    assert parts[1] != set(LabelFraction(full, 0.25, seed=2).indices.tolist())


def test_the_digest_is_that_of_the_chosen_samples(folder):
    digests = {LabelFraction(folder, fraction, seed).digest() for fraction, seed in [(0.5, 0), (0.5, 1), (0.25, 0)]}
    assert len(digests) == 3 and LabelFraction(folder, 0.5, 0).digest() in digests


@pytest.mark.parametrize("fraction", [0, 1.5, True, "5%"])
def test_a_share_outside_0_to_1_is_refused(fraction, folder):
    with pytest.raises(DatasetError, match="label_fraction"):
        LabelFraction(folder, fraction, seed=0)
