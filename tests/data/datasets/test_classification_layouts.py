"""What is wrong with an original, each told by the reader of its layout."""

import gzip
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from original_layouts import CLASSES, WRITERS, pickled, picture
from scipy.io import savemat

from bissl_zoo.data.datasets.classification_sets import (
    CLASSIFICATION_SETS,
    ClassificationSet,
    Layout,
    register_classification_set,
)
from bissl_zoo.data.datasets.voc import VOC_CLASSES, read_annotation
from bissl_zoo.errors import DatasetError, RegistryError
from bissl_zoo.registry import DATASETS, build_dataset


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a small original: `write("dtd")` -> its folder."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))

    def one(name):
        WRITERS[name](tmp_path)
        return tmp_path / CLASSIFICATION_SETS[name].folders[0]

    return one


def message(name, split="trainval", **options):
    with pytest.raises(DatasetError) as caught:
        build_dataset(name, split=split, **options)
    text = str(caught.value)
    assert text.startswith(f"Data set '{name}', split '{split}': ")
    assert text.endswith(f"python tools/prepare_data.py --check {name}")
    return text


def edit(file, change):
    file.write_text(change(file.read_text()))


def without_last_line(text):
    return text.rstrip("\n").rpartition("\n")[0] + "\n"


LISTS = {
    "food101": "meta/train.json",
    "cifar10": "data_batch_3",
    "cifar100": "meta",
    "cub200": "train_test_split.txt",
    "sun397": "Partitions/Training_01.txt",
    "stanford_cars": "devkit/cars_meta.mat",
    "fgvc_aircraft": "data/variants.txt",
    "voc2007_classification": "ImageSets/Main/dog_val.txt",
    "dtd": "labels/test1.txt",
    "oxford_pets": "annotations/trainval.txt",
    "flowers102": "setid.mat",
    "stl10": "train_y.bin",
    "fashion_mnist": "train-labels-idx1-ubyte.gz",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("damage", ["missing", "empty", "noise"])
def test_a_list_that_is_missing_or_damaged_is_named(name, damage, write):
    file = write(name) / LISTS[name]
    if damage == "missing":
        file.unlink()
        assert f"{file} does not exist" in message(name)
        return
    file.write_bytes({"empty": b"", "noise": bytes(range(256))}[damage])
    assert str(file).removesuffix(".gz") in message(name)


def test_classes_that_differ_between_splits_are_named(write):
    folder = write("food101")
    edit(folder / "meta" / "test.json", lambda text: text.replace("Great_Auk", "Lesser_Auk"))
    assert "differ, such as 'Great_Auk'" in message("food101", "test")
    edit(write("dtd") / "labels" / "val1.txt", lambda text: text.replace("dodo/", "DODO/"))
    assert "train1.txt (3) and of" in message("dtd", "train")
    edit(write("oxford_pets") / "annotations" / "test.txt", lambda text: text.replace("moa_", "kea_"))
    assert "'Kea'" in message("oxford_pets")
    os.rename(write("imagenet") / "val" / "n02102040", folder.parent / "imagenet" / "val" / "n02102041")
    for split in ("trainval", "test"):
        assert "such as 'n02102040'" in message("imagenet", split)


def test_labels_out_of_range_are_named(write):
    folder = write("cub200")
    edit(folder / "image_class_labels.txt", lambda text: text.replace("1 ", "1 9", 1))
    assert "labels are 0 to 2" in message("cub200")
    content = {"data": np.zeros((1, 3072), np.uint8), "labels": [3]}
    pickled(write("cifar10") / "data_batch_2", content)
    assert "data_batch_2#0 has label 3" in message("cifar10")
    folder = write("stl10")
    labels = bytearray((folder / "train_y.bin").read_bytes())
    labels[4] = 0  # STL-10 counts from 1
    (folder / "train_y.bin").write_bytes(labels)
    assert "train_X.bin#4 has label -1" in message("stl10")
    folder = write("flowers102")
    savemat(folder / "imagelabels.mat", {"labels": np.full((1, 100), 103)})
    assert "has label 102, but the labels are 0 to 101" in message("flowers102")
    edit(write("sun397") / "Partitions" / "Testing_01.txt", lambda text: text.replace("/z/zoo/", "/z/zoos/", 1))
    assert "has the class 'z/zoos', which is none of the 3" in message("sun397", "test")
    edit(write("fgvc_aircraft") / "data" / "images_variant_val.txt", lambda text: text.replace("A300B4", "A300", 1))
    assert "has the class 'A300'" in message("fgvc_aircraft", "val")


def test_labels_and_images_of_different_number_are_told(write):
    folder = write("cub200")
    edit(folder / "image_class_labels.txt", without_last_line)
    assert "has 44 images and" in message("cub200")
    pickled(write("cifar100") / "test", {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1, 2]})
    assert "3 labels for 4 images" in message("cifar100", "test")
    folder = write("stl10")
    (folder / "test_y.bin").write_bytes((folder / "test_y.bin").read_bytes()[:-2])
    assert "has 13 labels for the 15 images" in message("stl10", "test")
    folder = write("fashion_mnist")
    shutil.copy(folder / "train-labels-idx1-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz")
    assert "30 labels for 15 images" in message("fashion_mnist", "test")
    savemat(write("flowers102") / "imagelabels.mat", {"labels": np.ones((1, 20))})
    assert "20 have a label" in message("flowers102", "test")
    edit(write("voc2007_classification") / "ImageSets" / "Main" / "cat_test.txt", without_last_line)
    assert "cat_test.txt lists 14 images, not the 15 of test.txt" in message("voc2007_classification", "test")


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_truncated_arrays_are_told(kept, write):
    def truncate(file):
        file.write_bytes(file.read_bytes()[:kept])
        return str(file)

    for name, file in (
        ("cifar10", "data_batch_5"),
        ("cifar100", "train"),
        ("fashion_mnist", "train-images-idx3-ubyte.gz"),
    ):
        assert truncate(write(name) / file).removesuffix(".gz") in message(name)
    folder = write("fashion_mnist")
    packed = folder / "train-images-idx3-ubyte.gz"
    (folder / "train-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes())[:kept])
    assert "train-images-idx3-ubyte" in message("fashion_mnist")
    assert truncate(write("stl10") / "train_X.bin") in message("stl10")


def test_an_array_file_that_is_cut_off_later_is_told_when_it_is_read(write):
    folder = write("stl10")
    dataset = build_dataset("stl10", split="unlabeled")
    (folder / "unlabeled_X.bin").write_bytes((folder / "unlabeled_X.bin").read_bytes()[:-1])
    assert dataset[4][0].size == (96, 96)
    with pytest.raises(DatasetError, match="Image 5 of .*unlabeled_X.bin cannot be read"):
        dataset[5]


def test_a_pickle_that_is_a_program_is_not_run(write, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    file = write("cifar10") / "data_batch_1"
    file.write_bytes(pickle.dumps({"data": Program()}, protocol=2))
    assert "asks for posix.mkdir" in message("cifar10")
    assert not (tmp_path / "canary").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "canary").exists()  # it would have


def test_images_named_twice_are_told(write):
    edit(write("dtd") / "labels" / "train1.txt", lambda text: text + text.splitlines()[0])
    assert "names the image 'images/" in message("dtd", "train")


def test_lines_that_make_no_sense_are_told(write):
    edit(write("oxford_pets") / "annotations" / "test.txt", lambda text: text + "Abyssinian_1\n")
    assert "the line 'Abyssinian_1' should have 4 columns" in message("oxford_pets", "test")
    edit(write("oxford_pets") / "annotations" / "test.txt", lambda text: text.replace("moa_100 3", "moa_100 2"))
    assert "gives label 2 to both 'Moa' and 'Dodo'" in message("oxford_pets", "test")
    edit(write("cub200") / "image_class_labels.txt", lambda text: text.replace("1 ", "1 x", 1))
    assert "should be a whole number" in message("cub200")
    (write("food101") / "meta" / "train.json").write_text(json.dumps(CLASSES))
    assert "should map each class" in message("food101")
    edit(write("voc2007_classification") / "ImageSets" / "Main" / "cat_val.txt", lambda text: text.replace("-1", " 2"))
    assert "'2' should be 1, 0 or -1" in message("voc2007_classification", "val")


def test_sun397_without_its_lists_says_where_they_come_from(write):
    folder = write("sun397")
    shutil.rmtree(folder / "Partitions")
    text = message("sun397")
    assert f"{folder / 'Partitions'} does not hold" in text and "SUN/download/Partitions.zip" in text


def test_stanford_cars_without_the_test_labels_is_told(write):
    folder = write("stanford_cars")
    shutil.copy(folder / "devkit" / "cars_test_annos.mat", folder / "cars_test_annos_withlabels.mat")
    assert "has no labels" in message("stanford_cars", "test")


def test_imagenet_with_val_in_one_heap_is_told(write):
    folder = write("imagenet")
    shutil.rmtree(folder / "val")
    picture(folder / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    assert "no class folders" in message("imagenet", "test") and "come unsorted" in message("imagenet", "test")
    assert len(build_dataset("imagenet", split="trainval")) == 30
    (folder / "train" / "n01440765").mkdir()
    assert "n01440765 holds no images" in message("imagenet")


def test_classes_of_the_same_words_are_told_apart(write):
    folder = write("imagenet")
    for part in ("train", "val"):
        for wnid in ("n02012849", "n03126707", "n99999999"):  # cranes that fly and cranes that lift
            picture(folder / part / wnid / "a.JPEG", 0)
    classes = build_dataset("imagenet", split="test").classes
    assert classes[2:4] == ["crane (n02012849)", "English springer, English springer spaniel"]
    assert classes[4:] == ["crane (n03126707)", "n99999999"]


def test_caltech101_needs_images_to_test_on(write):
    folder = write("caltech101")
    for number in range(29, 35):
        (folder / "101_ObjectCategories" / "dodo" / f"image_{number:04d}.jpg").unlink()
    assert "Class 1 has 29 images. Of each class 30" in message("caltech101")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dtd", {"partition": 11}, "partition is 11; it must be one of 1, 2"),
        ("sun397", {"partition": 0}, "partition is 0"),
        ("caltech101", {"partition": 0}, "partition is 0; it must be a whole number from 1 on"),
        ("stl10", {"fold": 10}, "fold is 10; it must be 0 to 9, or None"),
        ("voc2007_classification", {"difficult": "positiv"}, "Did you mean 'positive'"),
    ],
)
def test_options_that_are_none_are_told(name, options, said, write):
    write(name)
    assert said in message(name, **options)


# several labels per image, against the boxes of the same images


@pytest.mark.parametrize(("difficult", "value"), [("ignore", -1), ("positive", 1), ("negative", 0)])
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_labels_are_what_the_annotations_say(difficult, value, split, write):
    folder = write("voc2007_classification")
    dataset = build_dataset("voc2007_classification", split=split, difficult=difficult)
    assert dataset.classes == list(VOC_CLASSES) and dataset.targets.dtype == np.float32
    only_difficult = 0
    for index in range(len(dataset)):
        stem = os.path.splitext(os.path.basename(dataset.source(index)))[0]
        annotation = read_annotation(folder / "Annotations" / f"{stem}.xml")
        for label, name in enumerate(VOC_CLASSES):
            flags = [flag for one, flag in zip(annotation.names, annotation.difficult, strict=True) if one == name]
            only_difficult += bool(flags) and all(flags)
            expected = 0 if not flags else value if all(flags) else 1
            assert dataset.label(index)[label] == expected
    assert only_difficult > 3


def test_a_set_of_ones_own_has_all_that_the_others_have(write, monkeypatch):
    monkeypatch.setattr(DATASETS, "_obj_map", dict(DATASETS._obj_map))
    monkeypatch.setattr("bissl_zoo.data.datasets.classification_sets.CLASSIFICATION_SETS", dict(CLASSIFICATION_SETS))
    dtd = CLASSIFICATION_SETS["dtd"]
    mine = Layout("mine", ("mine",), lambda folder, part: dtd.read(folder, part, partition=1), dtd.parts, 3)
    write("dtd").rename(os.path.join(os.environ["BISSL_ZOO_DATASETS"], "mine"))
    register_classification_set("mine", mine)
    dataset = build_dataset("mine", split="trainval")
    assert isinstance(dataset, ClassificationSet) and len(dataset) == 30
    with pytest.raises(RegistryError, match="registered already"):
        register_classification_set("food101", mine)
