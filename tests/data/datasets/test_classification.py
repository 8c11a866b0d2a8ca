import hashlib
import json
import os
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from original_layouts import WRITERS, accept_small_copies, picture, shade, sizes_of
from scipy.io import savemat

from bissl_zoo.config import LazyConfig, config_root, instantiate
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.data.datasets.classification import (
    CLASSIFICATION_SETS,
    Layout,
    register_classification_set,
)
from bissl_zoo.errors import DatasetError, RegistryError
from bissl_zoo.registry import DATASETS, build_dataset

NAMES = sorted(CLASSIFICATION_SETS)
#: one set of each kind: image files with and without lists, arrays, several labels, official validation images
KINDS = ["caltech101", "cifar10", "dtd", "stl10", "voc2007_classification"]
DRAWN = [name for name in NAMES if "val" not in CLASSIFICATION_SETS[name].images]
OPTIONS = {
    "voc2007_classification": [{"difficult": how} for how in ("ignore", "positive", "negative")],
}
#: sha256 of files, labels, class names and digests of all splits, recorded from readers that were compared with
#: torchvision's, official list by official list
GOLDEN = {
    "caltech101": "c58aa072602927d5",
    "cifar10": "a58c6cf8360e0bc1",
    "cifar100": "ac73d2a5cd104f15",
    "cub200": "eae39ac13525edb9",
    "dtd": "699ee70e5210acf5",
    "fashion_mnist": "2f61ac131beaf4c0",
    "fgvc_aircraft": "c7753874f5059f16",
    "flowers102": "bfd6026a6bc44045",
    "food101": "c575459c6ec2ff39",
    "imagenet": "405ad3059c405460",
    "oxford_pets": "90b4bb32d3206b89",
    "stanford_cars": "ceb37b9ebf32fef8",
    "stl10": "798475ae816ff51e",
    "sun397": "1ea5ab6cec6dd2cc",
    "voc2007_classification": "0a9fce818672e2dc",
}


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
    accept_small_copies(monkeypatch)
    return originals


@pytest.fixture
def copy(datasets, tmp_path, monkeypatch):
    """Return a copy of a set that a test may damage: `copy("dtd")` -> its folder."""

    def make(name):
        folder = CLASSIFICATION_SETS[name].folders[0]
        shutil.copytree(datasets / folder, tmp_path / folder, dirs_exist_ok=True)
        monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
        return tmp_path / folder

    return make


def sources(dataset):
    return [dataset.source(index) for index in range(len(dataset))]


def names_in(dataset):
    return {os.path.relpath(source, dataset.root) for source in sources(dataset)}


@pytest.mark.parametrize("name", NAMES)
def test_splits_labels_and_class_names_are_those_of_earlier_versions(name, datasets):
    content = []
    for options in OPTIONS.get(name, [{}]):
        for drawing in ({}, {"seed": 1, "val_fraction": 0.4}):
            for split in CLASSIFICATION_SETS[name].splits:
                dataset = build_dataset(name, split=split, **options, **drawing)
                files = [os.path.relpath(file, datasets) for file in sources(dataset)]
                labels = None if dataset.targets is None else [str(dataset.targets.dtype), dataset.targets.tolist()]
                key = f"{name} {options} {drawing} {split}"
                content.append([key, files, labels, dataset.classes, dataset.digest()])
    assert hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_image_comes_with_its_label(name):
    sizes = sizes_of(name)
    for part, size in sizes.items():
        dataset = build_dataset(name, split=part)
        assert len(dataset) == size
        for index in range(len(dataset)):
            image, label = dataset[index]
            assert image.mode == "RGB"
            red = image.getpixel((0, 0))[0]
            if part == "unlabeled":
                assert label is None and dataset.classes is None
            elif name == "voc2007_classification":
                assert label.dtype == torch.float32 and label.shape == (20,) and label[round(red / 40)] == 1
                assert label.tolist() == dataset.target(index).tolist() == dataset.targets[index].tolist()
            else:
                assert type(label) is int and label == dataset.target(index) == dataset.targets[index]
                assert abs(red - shade(label)) <= 3, dataset.source(index)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_val_share_trainval_and_test_shares_nothing(name):
    train, val, trainval, test = (build_dataset(name, split=split) for split in ("train", "val", "trainval", "test"))
    assert names_in(train) | names_in(val) == names_in(trainval)
    assert not names_in(train) & names_in(val) and not names_in(trainval) & names_in(test)
    assert len(train) + len(val) == len(trainval) == len(names_in(trainval))
    assert train.classes == val.classes == trainval.classes == test.classes
    assert len(set(train.classes)) == len(train.classes) and not any("_" in name for name in train.classes)
    if name in DRAWN:
        assert np.bincount(val.targets).tolist() == [len(trainval) // 3 // 5] * 3
        assert names_in(val) != names_in(build_dataset(name, split="val", seed=1))
    else:
        assert val.digest() == build_dataset(name, split="val", seed=1, val_fraction=0.5).digest()


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_elsewhere_and_a_pickled_one_have_the_same_digest_and_images(name, copy, monkeypatch):
    digests = {split: sample_digest(build_dataset(name, split=split)) for split in CLASSIFICATION_SETS[name].splits}
    assert len(set(digests.values())) == len(digests)
    unlabelled = build_dataset(name, split="trainval", labelled=False)
    assert unlabelled[0][1] is None and unlabelled.classes is None and unlabelled.targets is None
    folder = copy(name)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), key=lambda entry: entry[::-1]))
    for split, digest in digests.items():
        assert sample_digest(build_dataset(name, split=split, root=str(folder))) == digest
    pickled = ForkingPickler.loads(
        ForkingPickler.dumps(build_dataset(name, split="trainval"))
    )  # as for a spawned worker
    for index in (0, len(pickled) - 1, -1):
        assert pickled[index][0].tobytes() == unlabelled[index][0].tobytes()
    with pytest.raises(IndexError):
        pickled[len(pickled)]


@pytest.mark.parametrize("name", ["food101", "voc2007_classification"])
def test_a_missing_set_names_the_folder_the_command_and_the_variable(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    with pytest.raises(DatasetError, match=f"bissl data {name}\n.*BISSL_ZOO_DATASETS") as caught:
        build_dataset(name)
    assert str(tmp_path / CLASSIFICATION_SETS[name].folders[0]) in str(caught.value)


def test_a_misspelt_argument_is_refused_with_the_nearest():
    with pytest.raises(DatasetError, match="food101 has no split 'tset'. Did you mean 'test'\\? There are train, val"):
        build_dataset("food101", split="tset")
    with pytest.raises(DatasetError, match="Did you mean 'positive'"):
        build_dataset("voc2007_classification", difficult="positiv")
    with pytest.raises(RegistryError, match="'voc2007_classification' does not take 'dificult'. Did you mean 'diff"):
        build_dataset("voc2007_classification", dificult="ignore")


@pytest.mark.parametrize("name", ["cub200", "oxford_pets"])
def test_a_listed_image_that_does_not_exist_is_named(name, copy):
    copy(name)
    victim = build_dataset(name, split="test").source(3)
    os.unlink(victim)
    with pytest.raises(DatasetError, match=f"'{name}', split 'test'.*{victim} is listed, but does not exist"):
        build_dataset(name, split="test")


LISTS = {
    "food101": "meta/train.json",
    "cifar10": "data_batch_3",
    "sun397": "Partitions/Training_01.txt",
    "stanford_cars": "devkit/cars_train_annos.mat",
    "voc2007_classification": "ImageSets/Main/dog_val.txt",
    "stl10": "train_y.bin",
    "fashion_mnist": "train-labels-idx1-ubyte",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_missing_or_damaged_list_is_an_error_that_names_the_set_and_the_check(name, copy):
    file = copy(name) / LISTS[name]
    for content in (bytes(range(256)), b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DatasetError, match=f"Data set '{name}', split 'trainval', in /") as error:
            build_dataset(name, split="trainval")
        assert str(error.value).endswith(f"bissl data --check {name}")


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "data_batch_5"), ("fashion_mnist", "train-images-idx3-ubyte"), ("stl10", "train_X.bin")],
)
def test_a_truncated_array_is_refused(name, file, copy):
    path = copy(name) / file
    content = path.read_bytes()
    for kept in (0, 10, -1):
        path.write_bytes(content[:kept])
        with pytest.raises(DatasetError, match=f"Data set '{name}'"):
            build_dataset(name, split="trainval")


def test_a_pickle_with_another_checksum_is_not_loaded(copy, tmp_path, monkeypatch):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    file = copy("cifar10") / "data_batch_1"
    monkeypatch.undo()
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    file.write_bytes(pickle.dumps({"data": Program()}, protocol=2))
    with pytest.raises(DatasetError, match="not found or corrupted"):
        build_dataset("cifar10", split="trainval")
    assert not (tmp_path / "canary").exists()


def test_labels_that_do_not_fit_are_refused(copy):
    folder = copy("cub200")
    labels = folder / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("1 ", "1 9", 1))
    with pytest.raises(DatasetError, match="Labels from 0 to 9"):
        build_dataset("cub200", split="trainval")
    folder = copy("flowers102")
    savemat(folder / "imagelabels.mat", {"labels": np.full((1, 100), 103)})
    with pytest.raises(DatasetError, match="Labels from 102 to 102 for 102 classes"):
        build_dataset("flowers102", split="trainval")
    folder = copy("stl10")
    (folder / "test_y.bin").write_bytes((folder / "test_y.bin").read_bytes()[:-2])
    with pytest.raises(DatasetError, match="13 labels for 15 images"):
        build_dataset("stl10", split="test")


def test_imagenet_with_unsorted_val_images_names_the_command(copy):
    folder = copy("imagenet")
    shutil.rmtree(folder / "val")
    picture(folder / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(DatasetError, match="no class folders.*torchvision.datasets.ImageNet"):
        build_dataset("imagenet", split="test")
    assert len(build_dataset("imagenet", split="trainval")) == 30


def test_imagenet_classes_with_the_same_words_carry_their_ids(copy):
    folder = copy("imagenet")
    for wnid in ("n02012849", "n03126707", "n99999999"):  # the bird and the machine
        picture(folder / "val" / wnid / "a.JPEG", 0)
    classes = build_dataset("imagenet", split="test").classes
    assert classes[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert classes[2:] == [
        "crane (n02012849)",
        "English springer, English springer spaniel",
        "crane (n03126707)",
        "n99999999",
    ]


@pytest.mark.parametrize("split", ["trainval", "test", "unlabeled"])
def test_stl10_is_read_as_torchvision_reads_it(split, datasets, monkeypatch):
    monkeypatch.setattr(tv.STL10, "_check_integrity", lambda self: True)
    reference = tv.STL10(datasets, split="train" if split == "trainval" else split)
    dataset = build_dataset("stl10", split=split)
    assert len(dataset) == len(reference)
    for index in range(len(reference)):
        (image, label), (expected, target) = dataset[index], reference[index]
        assert image.tobytes() == expected.convert("RGB").tobytes()
        assert label == (None if target == -1 else target)


def test_a_registered_set_is_built_by_its_name(copy, monkeypatch):
    monkeypatch.setattr(DATASETS, "_obj_map", dict(DATASETS._obj_map))
    monkeypatch.setattr("bissl_zoo.data.datasets.classification.CLASSIFICATION_SETS", dict(CLASSIFICATION_SETS))
    dtd = CLASSIFICATION_SETS["dtd"]
    mine = Layout("mine", ("mine",), dtd.read, dtd.images, 3)
    copy("dtd").rename(os.path.join(os.environ["BISSL_ZOO_DATASETS"], "mine"))
    register_classification_set("mine", mine)
    assert build_dataset("mine", split="trainval").classes == ["Great Auk", "dodo", "moa"]
    with pytest.raises(RegistryError, match="already registered"):
        register_classification_set("food101", mine)


@pytest.mark.parametrize("name", ["dtd", "food101"])  # with official validation images, and with drawn ones
def test_the_config_section_holds_validation_images_out_of_training(name, tmp_path):
    (tmp_path / "common").symlink_to(config_root() / "common", target_is_directory=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.py").write_text(
        "from ..common.data.classification import loaders, unlabelled\n"
        f"dataloader = dict(pretext=unlabelled('{name}'), **loaders('{name}', val='val', batch_size=6, seed=3))\n"
    )
    cfg = LazyConfig.load(tmp_path / "mine" / "config.py")
    assert cfg.dataloader.train.dataset.split == "train" and cfg.dataloader.val.batch_size == 6
    files = {role: set(sources(instantiate(cfg.dataloader[role].dataset))) for role in ("train", "val", "test")}
    assert all(files.values()) and not (files["train"] & files["val"] or files["val"] & files["test"])
    assert files["train"] | files["val"] == set(sources(build_dataset(name, split="trainval")))
