import os

import numpy as np
import pytest
from PIL import Image

from bissl_zoo.data import ImageFolder
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.data.datasets.folder import draw_fraction, draw_per_class
from bissl_zoo.errors import DatasetError


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """pets/train with two cats and three dogs, pets/test with one of each."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    for number, name in enumerate(["dog/b.PNG", "dog/a.jpeg", "dog/more/c.bmp", "cat/2.tif", "cat/1.WebP"]):
        picture(tmp_path / "pets" / "train" / name, number * 10)
    for name in ["dog/a.jpg", "cat/b.jpg"]:
        picture(tmp_path / "pets" / "test" / name)
    (tmp_path / "pets" / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / "dog" / "._a.jpeg").write_text("left by a file manager")
    (tmp_path / "pets" / "train" / ".cache").mkdir()
    return tmp_path / "pets"


def sources(dataset):
    return [os.path.relpath(dataset.source(i), dataset.root) for i in range(len(dataset))]


def test_class_folders_become_labels_in_sorted_order(pets):
    dataset = ImageFolder("pets", split="train")
    assert dataset.classes == ["cat", "dog"]
    assert sources(dataset) == ["cat/1.WebP", "cat/2.tif", "dog/a.jpeg", "dog/b.PNG", "dog/more/c.bmp"]
    image, label = dataset[3]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", (0, 0, 0), 1)
    assert [dataset[i][1] for i in range(5)] == [0, 0, 1, 1, 1]
    assert type(label) is int


def test_unlabelled_images_are_read_at_any_depth(pets):
    dataset = ImageFolder("pets", labelled=False)
    assert len(dataset) == 7 and dataset.classes is None and dataset[0][1] is None
    assert sources(dataset) == sorted(sources(dataset))


def test_links_to_folders_are_followed_but_not_in_circles(pets):
    (pets / "train" / "dog" / "again").symlink_to(pets, target_is_directory=True)
    (pets / "test" / "dog" / "linked").symlink_to(pets / "train" / "cat", target_is_directory=True)
    assert len(ImageFolder("pets", split="test", labelled=False)) == 4
    # Three dogs; through the link the two test images, and the two cats twice: as train/cat and as test/dog/linked.
    assert [label for _, label in ImageFolder("pets", split="train")].count(1) == 3 + 2 + 2 * 2


def test_class_folders_besides_the_classes_are_refused_with_the_nearest(pets):
    with pytest.raises(DatasetError, match=r"pets/test has class folders that `classes` lacks: dog\. Add them"):
        ImageFolder("pets", split="test", classes=["bird", "cat"])
    with pytest.raises(DatasetError, match=r"lacks: dog\. Did you mean 'dogs'\?"):
        ImageFolder("pets", split="test", classes=["cat", "dogs"])
    with pytest.raises(DatasetError, match="classes names cat more than once"):
        ImageFolder("pets", split="test", classes=["cat", "dog", "cat"])
    with pytest.raises(DatasetError, match='classes is "cat"; give a list of names'):
        ImageFolder("pets", split="test", classes="cat")


def test_classes_without_images_are_logged(pets, caplog):
    (pets / "test" / "bird").mkdir()
    dataset = ImageFolder("pets", split="test", classes=["ant", "dog", "bird", "cat"])
    assert dataset.classes == ["ant", "dog", "bird", "cat"] and [label for _, label in dataset] == [1, 3]
    assert f"{pets}/test has no images of 2 of 4 classes: ant, bird" in caplog.text
    caplog.clear()
    ImageFolder("pets", split="train", classes=["dog", "cat"])
    assert not caplog.records


def test_limit_keeps_an_evenly_spread_part(pets):
    dataset = ImageFolder("pets", split="train", limit=3)
    assert sources(dataset) == ["cat/1.WebP", "cat/2.tif", "dog/b.PNG"]
    assert [dataset[i][1] for i in range(3)] == [0, 0, 1]
    assert len(ImageFolder("pets", split="train", limit=99)) == 5


def test_empty_split_empty_class_and_folder_without_classes_are_refused(pets):
    (pets / "val" / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match="Class folder .*cat holds no images. Accepted are bmp, jpeg"):
        ImageFolder("pets", split="val")
    with pytest.raises(DatasetError, match="no images below"):
        ImageFolder("pets", split="val", labelled=False)
    with pytest.raises(DatasetError, match="no class folders.*labelled=False"):
        ImageFolder("pets", split="train/cat")


# a validation set that is drawn


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Folders of 10, 25, 1 and 2 images: `drawn("val", seed=1)` -> the part of it."""

    def write(root):
        for name, count in (("a", 10), ("b", 25), ("c", 1), ("d", 2)):
            for number in range(count):
                picture(root / "mine" / name / f"{number}.png", number)

    write(tmp_path / "one")
    write(tmp_path / "deep" / "other")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "one"))
    return lambda part=None, **arguments: ImageFolder("mine", part=part, **arguments)


def labels(dataset):
    return np.bincount([label for _, label in dataset], minlength=4).tolist()


def test_parts_hold_every_image_once_and_the_same_share_of_each_class(drawn):
    train, val, whole = drawn("train"), drawn("val"), drawn()
    assert labels(val) == [2, 5, 0, 1] and labels(train) == [8, 20, 1, 1]
    assert sorted(sources(train) + sources(val)) == sorted(sources(whole)) and len(whole) == 38
    assert train.classes == val.classes == whole.classes == ["a", "b", "c", "d"]
    names = dict(zip(sources(whole), (label for _, label in whole), strict=True))
    assert all(names[name] == label for name, (_, label) in zip(sources(val), val, strict=True))
    assert labels(drawn("val", val_fraction=0.5)) == [5, 12, 0, 1]


def test_the_seed_decides_the_parts_on_every_machine(drawn, tmp_path, monkeypatch):
    first, digests = sources(drawn("val")), {part: sample_digest(drawn(part)) for part in ("train", "val", None)}
    assert first == sources(drawn("val", seed=0)) != sources(drawn("val", seed=1))
    assert len(set(digests.values())) == 3 and digests["val"] != sample_digest(drawn("val", seed=1))
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "deep" / "other"))
    assert sources(drawn("val")) == first
    assert digests == {part: sample_digest(drawn(part)) for part in ("train", "val", None)}


def test_parts_that_cannot_be_drawn_are_refused(drawn):
    with pytest.raises(DatasetError, match="part is 'test'; accepted are"):
        drawn("test")
    with pytest.raises(DatasetError, match='part="val" is drawn per class and needs labels'):
        drawn("val", labelled=False)


# draws


def labels_of(*sizes, seed=0):
    """Labels of classes of these sizes, in disorder."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def test_the_same_fraction_of_each_class_is_drawn_rounded_down():
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


def test_the_given_number_of_each_class_is_drawn_and_one_image_left():
    labels = labels_of(31, 50, 0, 40)
    drawn = draw_per_class(labels, 30, seed=0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == [30, 30, 0, 30]
    assert (drawn == draw_per_class(labels, 30, 0)).all() and (drawn != draw_per_class(labels, 30, 1)).any()
    with pytest.raises(DatasetError, match="Class 0 has 30 images; 30 are drawn"):
        draw_per_class(labels_of(30, 31), 30, 0)
