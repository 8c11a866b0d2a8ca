import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from original_layouts import SIZES, WRITERS, shade, sizes_of

from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.data.datasets.classification_sets import CLASSIFICATION_SETS
from bissl_zoo.errors import DatasetError, RegistryError
from bissl_zoo.registry import build_dataset

NAMES = sorted(CLASSIFICATION_SETS)
SINGLE = [name for name in NAMES if name != "voc2007_classification"]
OWN_VAL = [name for name in NAMES if "val" in CLASSIFICATION_SETS[name].parts]
DRAWN = [name for name in NAMES if name not in OWN_VAL]
FILES = [name for name in NAMES if name not in ("cifar10", "cifar100", "stl10", "fashion_mnist")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with a small set in every original layout."""
    root = tmp_path_factory.mktemp("originals")
    for write in WRITERS.values():
        write(root)
    return root


@pytest.fixture(autouse=True)
def datasets(originals, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(originals))
    return originals


def sources(dataset):
    return [dataset.source(index) for index in range(len(dataset))]


def names_in(dataset):
    return {os.path.relpath(source, dataset.root) for source in sources(dataset)}


def test_every_set_of_the_catalog_has_a_small_original():
    assert NAMES == sorted(WRITERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_image_comes_with_its_own_label(name):
    sizes = sizes_of(name)
    for part, size in sizes.items():
        dataset = build_dataset(name, split=part)
        assert len(dataset) == size
        for index in range(len(dataset)):
            image, label = dataset[index]
            assert image.mode == "RGB"
            if part == "unlabeled":
                assert label is None and dataset.classes is None
                continue
            if name == "voc2007_classification":
                assert label.dtype == torch.float32 and label.shape == (20,) and label[round(red(image) / 40)] == 1
                assert label.tolist() == dataset.label(index).tolist() == dataset.targets[index].tolist()
                continue
            assert type(label) is int and label == dataset.label(index) == dataset.targets[index]
            assert abs(red(image) - shade(label)) <= 3, dataset.source(index)


def red(image):
    return image.getpixel((0, 0))[0]


@pytest.mark.parametrize("name", NAMES)
def test_train_and_val_share_trainval_and_test_shares_nothing(name):
    train, val, trainval, test = (build_dataset(name, split=split) for split in ("train", "val", "trainval", "test"))
    assert names_in(train) | names_in(val) == names_in(trainval)
    assert not names_in(train) & names_in(val) and not names_in(trainval) & names_in(test)
    assert len(train) + len(val) == len(trainval) == len(names_in(trainval))
    assert train.classes == val.classes == trainval.classes == test.classes
    assert len(set(train.classes)) == len(train.classes) and not any("_" in name for name in train.classes)


@pytest.mark.parametrize("name", DRAWN)
def test_val_is_drawn_of_every_class_with_the_seed(name):
    def split(part, **arguments):
        return build_dataset(name, split=part, **arguments)

    per_class = len(split("trainval")) // 3
    assert np.bincount(split("val").targets).tolist() == [per_class // 5] * 3
    assert np.bincount(split("val", val_fraction=0.5).targets).tolist() == [per_class // 2] * 3
    assert names_in(split("val")) == names_in(split("val", seed=0)) != names_in(split("val", seed=1))
    assert names_in(split("train", seed=1)) | names_in(split("val", seed=1)) == names_in(split("trainval"))
    assert split("test", seed=1).digest() == split("test").digest()
    with pytest.raises(DatasetError, match=f"{name}.*val_fraction is 2"):
        split("train", val_fraction=2)


@pytest.mark.parametrize("name", OWN_VAL)
def test_a_val_split_that_the_original_has_is_used(name):
    val = build_dataset(name, split="val")
    assert len(val) == 3 * SIZES["val"]
    assert val.digest() == build_dataset(name, split="val", seed=1, val_fraction=0.5).digest()


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_names_the_split_and_not_the_machine(name, datasets, tmp_path, monkeypatch):
    digests = {split: sample_digest(build_dataset(name, split=split)) for split in CLASSIFICATION_SETS[name].splits}
    assert len(set(digests.values())) == len(digests)
    other = sample_digest(build_dataset(name, split="train", seed=1))
    assert (other != digests["train"]) == (name in DRAWN)
    # on another machine, where the file system lists files in another order
    folder = CLASSIFICATION_SETS[name].folders[0]
    shutil.copytree(datasets / folder, tmp_path / "elsewhere" / folder)
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "elsewhere"))
    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), key=lambda entry: entry[::-1]))
    monkeypatch.setattr(os, "scandir", lambda path: Entries(sorted(scandir(path), key=lambda entry: entry.name[::-1])))
    for split, digest in digests.items():
        assert sample_digest(build_dataset(name, split=split)) == digest
    assert build_dataset(name, split="train").source(0).startswith(str(tmp_path / "elsewhere" / folder))


class Entries(list):
    """What os.scandir returns, in an order of ours."""

    def __enter__(self):
        return iter(self)

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_labels_may_be_left_out(name):
    dataset = build_dataset(name, split="trainval", labelled=False)
    image, label = dataset[0]
    assert label is None and dataset.classes is None and dataset.targets is None and image.mode == "RGB"
    assert dataset.digest() == build_dataset(name, split="trainval").digest()


@pytest.mark.parametrize("name", NAMES)
def test_a_root_of_its_own_replaces_the_usual_folder(name, datasets, tmp_path, monkeypatch):
    usual = datasets / CLASSIFICATION_SETS[name].folders[0]
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    (tmp_path / "mine").symlink_to(usual, target_is_directory=True)
    below, absolute = (build_dataset(name, split="test", root=root) for root in ("mine", str(usual)))
    assert below.digest() == absolute.digest()
    assert below.source(0).startswith(str(tmp_path / "mine"))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_set_names_the_folder_the_command_and_the_variable(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    with pytest.raises(DatasetError) as caught:
        build_dataset(name)
    message = str(caught.value)
    assert str(tmp_path / CLASSIFICATION_SETS[name].folders[0]) in message
    assert f"python tools/prepare_data.py {name}\n" in message and "BISSL_ZOO_DATASETS" in message


def test_what_is_misspelt_is_told_with_the_nearest():
    with pytest.raises(DatasetError, match="food101 has no split 'tset'. Did you mean 'test'\\? There are train, val"):
        build_dataset("food101", split="tset")
    with pytest.raises(DatasetError, match="food101 has no split 'unlabeled'"):
        build_dataset("food101", split="unlabeled")
    with pytest.raises(RegistryError, match="'dtd' does not take 'partion'. Did you mean 'partition'"):
        build_dataset("dtd", partion=2)
    with pytest.raises(RegistryError, match="'food101' does not take 'partition'"):
        build_dataset("food101", partition=2)
    with pytest.raises(RegistryError, match="Did you mean 'oxford_pets'"):
        build_dataset("oxfordpets")


@pytest.mark.parametrize("name", NAMES)
def test_a_set_survives_the_way_to_a_worker(name):
    dataset = build_dataset(name, split="val")
    copy = pickle.loads(pickle.dumps(dataset))
    for index in (0, len(dataset) - 1, -1):
        one, other = dataset[index], copy[index]
        assert one[0].tobytes() == other[0].tobytes() and repr(one[1]) == repr(other[1])
    with pytest.raises(IndexError):
        copy[len(copy)]


@pytest.mark.parametrize("name", FILES)
def test_an_image_that_a_list_names_must_be_there(name, datasets, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(datasets / CLASSIFICATION_SETS[name].folders[0], root)
    victim = build_dataset(name, split="test", root=str(root)).source(3)
    os.unlink(victim)
    if name in ("caltech101", "imagenet"):  # folders are the lists; the count check of prepare_data.py finds it
        assert victim not in sources(build_dataset(name, split="test", root=str(root)))
        return
    with pytest.raises(
        DatasetError, match=rf"'{name}', split 'test': The image {victim}, listed in .*, does not exist"
    ):
        build_dataset(name, split="test", root=str(root))


# torchvision's readers of the same files


def pairs_of(samples, root):
    return sorted((os.path.relpath(file, root), int(label)) for file, label in samples)


def ours(name, split, **options):
    dataset = build_dataset(name, split=split, **options)
    return pairs_of(zip(sources(dataset), dataset.targets, strict=True), dataset.root.parent)


def theirs(dataset, root, files="_image_files", labels="_labels"):
    return pairs_of(zip(getattr(dataset, files), getattr(dataset, labels), strict=True), root)


@pytest.mark.parametrize(("split", "their_split"), [("trainval", "train"), ("test", "test")])
def test_food101_and_stanford_cars_are_read_as_torchvision_reads_them(split, their_split, datasets):
    food = tv.Food101(datasets, split=their_split)
    assert ours("food101", split) == theirs(food, datasets)
    assert build_dataset("food101").classes == [name.replace("_", " ") for name in food.classes]
    cars = tv.StanfordCars(datasets, split=their_split)
    assert ours("stanford_cars", split) == pairs_of(cars._samples, datasets)
    assert build_dataset("stanford_cars").classes == cars.classes


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_fgvc_aircraft_is_read_as_torchvision_reads_it(split, datasets):
    reference = tv.FGVCAircraft(datasets, split=split)
    assert ours("fgvc_aircraft", split) == theirs(reference, datasets)
    assert build_dataset("fgvc_aircraft").classes == reference.classes


@pytest.mark.parametrize("partition", [1, 2, 10])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_dtd_is_read_as_torchvision_reads_it(split, partition, datasets):
    reference = tv.DTD(datasets, split=split, partition=partition)
    assert ours("dtd", split, partition=partition) == theirs(reference, datasets / "dtd")
    assert build_dataset("dtd").classes == [name.replace("_", " ") for name in reference.classes]


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_oxford_pets_are_read_as_torchvision_reads_them(split, datasets):
    reference = tv.OxfordIIITPet(datasets, split=split)
    assert ours("oxford_pets", split) == theirs(reference, datasets, files="_images")
    assert build_dataset("oxford_pets").classes == reference.classes


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_flowers102_is_read_as_torchvision_reads_it(split, datasets, monkeypatch):
    monkeypatch.setattr(tv.Flowers102, "_check_integrity", lambda self: True)  # the md5 of the full lists
    reference = tv.Flowers102(datasets, split=split)
    assert ours("flowers102", split) == theirs(reference, datasets)
    assert build_dataset("flowers102").classes == list(tv.Flowers102.classes)


def test_sun397_holds_the_images_and_labels_that_torchvision_finds(datasets):
    reference = tv.SUN397(datasets)
    assert sorted(ours("sun397", "trainval") + ours("sun397", "test")) == theirs(reference, datasets)
    assert build_dataset("sun397").classes == [name.replace("_", " ") for name in reference.classes]
    assert set(ours("sun397", "test", partition=4)) < set(ours("sun397", "test"))


def test_caltech101_holds_the_images_and_labels_that_torchvision_finds(datasets):
    reference = tv.Caltech101(datasets)
    files = [
        datasets / "caltech101" / "101_ObjectCategories" / reference.categories[label] / f"image_{number:04d}.jpg"
        for number, label in zip(reference.index, reference.y, strict=True)
    ]
    found = sorted(ours("caltech101", "trainval") + ours("caltech101", "test"))
    assert found == pairs_of(zip(files, reference.y, strict=True), datasets)
    train = build_dataset("caltech101", split="trainval")
    assert np.bincount(train.targets).tolist() == [30, 30, 30]
    assert train.digest() != build_dataset("caltech101", split="trainval", partition=2).digest()
    assert train.digest() == build_dataset("caltech101", split="trainval", seed=5).digest()


@pytest.mark.parametrize(("name", "train"), [("cifar10", True), ("cifar10", False), ("cifar100", True)])
def test_cifar_is_read_as_torchvision_reads_it(name, train, datasets, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    reference = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name](datasets, train=train)
    same_samples(build_dataset(name, split="trainval" if train else "test"), reference)
    assert build_dataset(name).classes == [one.replace("_", " ") for one in reference.classes]


@pytest.mark.parametrize(("split", "fold"), [("trainval", None), ("trainval", 3), ("test", None), ("unlabeled", None)])
def test_stl10_is_read_as_torchvision_reads_it(split, fold, datasets, monkeypatch):
    monkeypatch.setattr(tv.STL10, "_check_integrity", lambda self: True)
    # np.fromstring of text, which torchvision reads the folds with, is deprecated
    reference = tv.STL10(datasets, split="train" if split == "trainval" else split, folds=fold)
    same_samples(build_dataset("stl10", split=split, fold=fold), reference)


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_fashion_mnist_is_read_as_torchvision_reads_it_packed_or_not(split, datasets, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(datasets / "FashionMNIST" / "raw", raw)
    for file in list(raw.iterdir()):
        tv.utils.extract_archive(str(file), remove_finished=True)
    reference = tv.FashionMNIST(tmp_path, train=split == "trainval")
    for root in (None, str(raw), str(datasets / "FashionMNIST" / "raw")):
        same_samples(build_dataset("fashion_mnist", split=split, root=root), reference)
    assert build_dataset("fashion_mnist").classes == reference.classes


def same_samples(dataset, reference):
    assert len(dataset) == len(reference)
    for index in range(len(reference)):
        (image, label), (expected, target) = dataset[index], reference[index]
        assert image.tobytes() == expected.convert("RGB").tobytes()
        assert label == (None if target == -1 else target)


@pytest.mark.parametrize("part", ["trainval", "test"])
def test_imagenet_is_read_as_folders_in_the_order_of_wordnet_ids(part, datasets):
    reference = tv.ImageFolder(datasets / "imagenet" / ("train" if part == "trainval" else "val"))
    assert ours("imagenet", part) == pairs_of(reference.samples, datasets)
    dogs = "English springer, English springer spaniel"
    assert build_dataset("imagenet", split=part).classes == ["tench, Tinca tinca", "goldfish, Carassius auratus", dogs]
