import numpy as np
import pytest

from bissl_zoo.data.datasets.folder import draw_fraction, draw_per_class
from bissl_zoo.errors import DatasetError


def labels_of(*sizes, seed=0):
    """Labels of classes of these sizes, in disorder."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def test_of_each_class_the_same_part_is_drawn_rounded_down():
    # the sizes of the BiSSL authors' validation lists: 150 of Food-101's 750, 10 of SUN397's 50, 5 of CUB's 29
    labels = labels_of(750, 50, 29, 30, 100)
    drawn = draw_fraction(labels, 0.2, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [150, 10, 5, 6, 20]
    assert np.bincount(labels[draw_fraction(labels, 0.29, 0)]).tolist() == [217, 14, 8, 8, 29]  # 0.29 * 100 < 29


def test_small_classes_give_one_and_keep_one():
    labels = labels_of(4, 2, 1, 0, 3)
    assert np.bincount(labels[draw_fraction(labels, 0.1, 0)], minlength=5).tolist() == [1, 1, 0, 0, 1]
    assert np.bincount(labels[draw_fraction(labels, 0.9, 0)], minlength=5).tolist() == [3, 1, 0, 0, 2]
    with pytest.raises(DatasetError, match="no class has two images"):
        draw_fraction(labels_of(1, 1), 0.5, 0)


def test_the_seed_decides_what_is_drawn():
    labels = labels_of(40, 40)
    first = draw_fraction(labels, 0.2, 0)
    assert (first == draw_fraction(labels, 0.2, 0)).all()
    assert (first != draw_fraction(labels, 0.2, 1)).any()


def test_what_is_drawn_of_a_class_does_not_depend_on_the_others():
    labels = labels_of(40, 40, 40)
    kept = labels != 1
    assert (draw_fraction(labels, 0.2, 3)[kept] == draw_fraction(labels[kept], 0.2, 3)).all()


def test_draws_are_spread_over_a_class():
    labels = np.zeros(1000, np.int64)
    times = sum(draw_fraction(labels, 0.2, seed).astype(int) for seed in range(200))
    assert times.sum() == 200 * 200
    assert 15 < times.min() < 40 < times.max() < 70  # 40 with a deviation of 5.7


def test_a_number_of_each_class_is_drawn_and_something_left():
    labels = labels_of(31, 50, 0, 40)
    drawn = draw_per_class(labels, 30, seed=0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == [30, 30, 0, 30]
    assert (drawn == draw_per_class(labels, 30, 0)).all() and (drawn != draw_per_class(labels, 30, 1)).any()
    with pytest.raises(DatasetError, match="Class 0 has 30 images. Of each class 30 are drawn, and one"):
        draw_per_class(labels_of(30, 31), 30, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, True, "0.2", float("nan"), None])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(DatasetError, match="val_fraction is"):
        draw_fraction(labels_of(9, 9), fraction, 0)


@pytest.mark.parametrize("seed", [-1, 0.5, None, True, "0"])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(DatasetError, match="seed is"):
        draw_fraction(labels_of(9, 9), 0.2, seed)


def test_several_labels_per_image_are_not_drawn_of():
    with pytest.raises(DatasetError, match="one label per image"):
        draw_fraction(np.zeros((4, 20), np.float32), 0.2, 0)
