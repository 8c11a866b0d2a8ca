import json
import os
import shutil

import pytest
from original_layouts import CALTECH, WRITERS, accept_small_copies, sizes_of, write_coco_detection
from PIL import Image

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import instantiate
from bissl_zoo.data.datasets.classification import CLASSIFICATION_SETS
from bissl_zoo.data.prepare import check
from bissl_zoo.data.prepare.check import known_sets, prepare, splits_of, survey, survey_path
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import DATASETS, build_dataset

CLASSES = {"voc2007_classification": 20, "flowers102": 102, "fashion_mnist": 10}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A datasets root in which small sets count as the originals."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    accept_small_copies(monkeypatch)
    for name, layout in CLASSIFICATION_SETS.items():
        changed = layout._replace(images=sizes_of(name), classes=CLASSES.get(name, 3))
        monkeypatch.setitem(CLASSIFICATION_SETS, name, changed)
    return root


# sets by name


@pytest.mark.parametrize("name", ["caltech101", "flowers102", "stl10", "voc2007_classification"])
def test_a_complete_set_has_no_problems(name, small):
    WRITERS[name](small)
    fetched, result = prepare(name)
    sizes = sizes_of(name)
    trainval = sizes.get("trainval") or sizes["train"] + sizes["val"]
    assert fetched == [] and result.problems == [] and result.notes == []
    images = {split.split: split.images for split in result.splits}
    assert images.items() >= {**sizes, "trainval": trainval}.items() and images["train"] + images["val"] == trainval
    assert {split.classes for split in result.splits if split.split != "unlabeled"} == {CLASSES.get(name, 3)}
    assert f"{trainval}" in result.table() and "boxes" not in result.table()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_file_that_cannot_be_decoded_is_named(workers, small):
    name = "food101"
    WRITERS[name](small)
    victims = [DATASETS.build(name, split=split).source(2) for split in ("train", "test")]
    for victim in victims:
        os.truncate(victim, os.path.getsize(victim) // 2)
    assert survey(name).problems == []
    problems = survey(name, open_files=True, num_workers=workers).problems
    assert len(problems) == 2
    for victim, problem in zip(victims, problems, strict=True):
        assert f"Image {victim} does not decode" in problem


def test_an_incomplete_set_is_compared_with_the_original(small):
    WRITERS["caltech101"](small)
    (small / "caltech101" / "101_ObjectCategories" / "moa" / f"image_{CALTECH:04d}.jpg").unlink()
    assert prepare("caltech101")[1].problems == ["caltech101, split test: 14 images, but the original has 15."]
    shutil.rmtree(small / "caltech101" / "101_ObjectCategories" / "moa")
    assert "caltech101, split test: 2 classes, but the original has 3." in prepare("caltech101")[1].problems
    WRITERS["food101"](small)
    shutil.rmtree(small / "food-101" / "images" / "moa")
    problems = prepare("food101")[1].problems
    assert len(problems) == 4 and all("and 9 more" in text or "and 4 more" in text for text in problems)


def test_images_that_two_splits_share_are_reported(small):
    WRITERS["dtd"](small)
    labels = small / "dtd" / "dtd" / "labels"
    shutil.copy(labels / "train1.txt", labels / "test1.txt")
    problems = survey("dtd", open_files=True, num_workers=0).problems
    assert "dtd: 18 images are both in trainval and in test." in problems


@pytest.fixture
def coco(small, monkeypatch):
    """A small COCO that counts as the original."""
    write_coco_detection(small)
    known = known_sets()["coco_detection"]._replace(images={"train2017": 3, "val2017": 2}, classes=1)
    monkeypatch.setattr(check, "known_sets", lambda: {"coco_detection": known})
    return small / "coco"


def test_problems_of_coco_are_found(coco):
    (coco / "val2017" / "000000000001.jpg").write_bytes(b"")
    (coco / "train2017" / "000000000000.jpg").unlink()
    problems = survey("coco_detection", open_files=True, num_workers=0).problems
    assert sum("000000000001.jpg does not decode" in problem for problem in problems) == 1
    assert "coco_detection, split train2017: 2 images, but the original has 3." in problems
    assert any("left out 1 images" in problem and "000000000000.jpg" in problem for problem in problems)
    path = coco / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][3] = 0
    path.write_text(json.dumps(content))
    assert any("the box has no area" in problem for problem in survey("coco_detection").problems)


# data at a path


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (60, 90, 10)).save(folder / name)


def look(path, **arguments):
    return survey_path(path, num_workers=0, **arguments)


def rows(result):
    return [tuple(split) for split in result.splits]


def build_as_noted(result):
    """Build the splits as the notes describe."""
    calls = dict(note.split(" is read by ") for note in result.notes if " is read by " in note)
    return {split: instantiate(eval(call, {"L": L, "build_dataset": build_dataset})) for split, call in calls.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.jpg", "b/c.png"], [("images", 2, None, None)]),
        (["cat/1.jpg", "cat/2.jpg", "dog/more/1.jpg"], [("images", 3, 2, None)]),
        (["car/1.jpg", "train/1.jpg"], [("images", 2, 2, None)]),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg", "unlabelled/9.jpg"], None),
        (["train/1.jpg", "val/2.jpg"], [("train", 1, None, None), ("val", 1, None, None)]),
    ],
)
def test_folders_of_images_are_recognised(tmp_path, files, expected):
    write_images(tmp_path, *files)
    (tmp_path / ".cache").mkdir()
    result = look(tmp_path)
    assert rows(result) == (expected or [("test", 2, 2, None), ("train", 2, 2, None), ("unlabelled", 1, None, None)])
    assert result.problems == [] and result.where == str(tmp_path)
    assert {split: len(dataset) for split, dataset in build_as_noted(result).items()} == {
        row[0]: row[1] for row in rows(result)
    }


def test_problems_of_folders_are_named(tmp_path):
    write_images(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg")
    (tmp_path / "test" / "cat" / "2.jpg").write_bytes(b"no image")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    result = look(tmp_path)
    assert len(result.problems) == 2
    assert "val: Class folder" in result.problems[0] and "holds no images" in result.problems[0]
    assert "test/cat/2.jpg does not decode" in result.problems[1]
    assert any(note.startswith("test and train differ in their classes (dog)") for note in result.notes)


@pytest.fixture
def street(tmp_path):
    """Boxes in COCO's format: street/annotations/{train,test}.json, of the same file names, and street/images."""
    boxes = {"train": [(1, 1, 4, 9), (2, 2, 8, 2), (0, 0, 20, 5), (3, 3, 2, 2)], "test": [(0, 0, 20, 16)]}
    for split, written in boxes.items():
        write_images(tmp_path / "street" / "images", *(f"{split}{number}.jpg" for number in range(2)))
        images = [{"id": n, "file_name": f"{split}{n}.jpg", "width": 20, "height": 16} for n in range(2)]
        content = {"images": images, "annotations": [], "categories": [{"id": 3, "name": "car"}]}
        for number, box in enumerate(written):
            content["annotations"].append({"id": number, "image_id": 0, "category_id": 3, "bbox": list(box)})
        if split == "train":  # a crowd, which is not used in training
            content["annotations"].append(
                {"id": 99, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 16], "iscrowd": 1}
            )
        (tmp_path / "street" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "street" / "annotations" / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "street" / "annotations" / "captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    return tmp_path / "street"


def test_a_folder_with_annotations_as_json_is_counted(street):
    result = look(street)
    assert rows(result) == [("test", 2, 1, 1), ("train", 2, 1, 5)] and result.problems == []
    assert {split: len(dataset.boxes) for split, dataset in build_as_noted(result).items()} == {"test": 1, "train": 5}


def test_a_json_file_is_checked_with_its_images_beside_it_or_in_a_given_folder(street, tmp_path):
    file = street / "annotations" / "train.json"
    assert rows(look(file)) == [("train", 2, 1, 5)]
    (street / "images").rename(tmp_path / "far")
    (tmp_path / "deep").mkdir()
    shutil.move(street, tmp_path / "deep")
    file = tmp_path / "deep" / "street" / "annotations" / "train.json"
    with pytest.raises(DatasetError, match=r"such as train0.jpg, are not near it. .*--images FOLDER"):
        look(file)
    assert look(file, images=tmp_path / "far").problems == []
    with pytest.raises(DatasetError, match="have no list 'categories'"):
        look(file.with_name("captions.json"))


def test_images_beside_their_json_file_are_found_if_splits_share_file_names(tmp_path):
    write_coco_detection(tmp_path)
    for place in ("train2017", "val2017"):
        file = tmp_path / "coco" / "annotations" / f"instances_{place}.json"
        assert splits_of(file)[file.stem]["images"] == f"../{place}"
    for split, name in (("train2017", "train"), ("val2017", "valid")):  # as Roboflow exports
        shutil.move(tmp_path / "coco" / split, tmp_path / "export" / name)
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        shutil.move(file, tmp_path / "export" / name / "_annotations.coco.json")
    result = look(tmp_path / "export")
    assert rows(result) == [("train/_annotations.coco", 3, 1, 3), ("valid/_annotations.coco", 2, 1, 2)]
    (problem,) = result.problems
    assert "1 objects with an impossible box" in problem and "annotation 4 (id 918)" in problem


@pytest.mark.parametrize("name", [".", "VOCdevkit", "VOCdevkit/VOC2007", "renamed"])
def test_a_devkit_is_recognised_from_each_of_its_folders(tmp_path, name):
    WRITERS["voc2007_classification"](tmp_path)
    year = tmp_path / "VOCdevkit" / "VOC2007"
    if name == "renamed":
        year = year.rename(tmp_path / "renamed")
    result = look(tmp_path / name)
    assert [row[:2] for row in rows(result)] == [("train", 18), ("trainval", 30), ("val", 12), ("test", 15)]
    assert result.problems == []
    assert {split: len(dataset) for split, dataset in build_as_noted(result).items()}["trainval"] == 30
    victim, annotation = sorted((year / "JPEGImages").iterdir())[0], sorted((year / "Annotations").iterdir())[1]
    victim.write_bytes(b"")
    annotation.write_text("<annotation>")
    problems = look(tmp_path / name).problems
    assert sum(str(victim) in problem for problem in problems) == 1  # though two splits hold it
    assert sum("images with an unreadable annotation" in problem for problem in problems) == 2


def test_two_years_are_distinguished_and_lists_of_other_names_are_read(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        WRITERS["voc2007_classification"](tmp_path, f"VOCdevkit/{year}")
    assert {row[0] for row in rows(look(tmp_path))} >= {"VOC2007 train", "VOC2012 train"}
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "morning.txt")
    for file in lists.glob("*.txt"):
        if file.stem != "morning":
            file.unlink()
    assert [row[0] for row in rows(look(lists.parents[1]))] == ["morning"]
    (lists / "morning.txt").unlink()
    with pytest.raises(DatasetError, match="no list of a split"):
        look(lists.parents[1])


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for path, message in (("empty", "is unknown"), ("notes.txt", "is unknown"), ("gone", "There is no")):
        with pytest.raises(DatasetError, match=f"{message}.*class folders.*COCO's format"):
            look(tmp_path / path)
