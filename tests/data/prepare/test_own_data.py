import json
import shutil

import numpy as np
import pytest
from original_layouts import WRITERS, write_coco_detection
from PIL import Image

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import instantiate
from bissl_zoo.data.prepare.own import splits_of, survey_path
from bissl_zoo.data.prepare.pack import pack_folder
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import build_dataset


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (60, 90, 10)).save(folder / name)


def look(path, **arguments):
    return survey_path(path, num_workers=0, **arguments)


def rows(found):
    return [tuple(one) for one in found.found]


def how_to_read(found):
    """The splits as the notes say that a config reads them."""
    calls = dict(note.split(" is read by ") for note in found.notes if " is read by " in note)
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
    pictures(tmp_path, *files)
    (tmp_path / ".cache").mkdir()
    found = look(tmp_path)
    assert rows(found) == (expected or [("test", 2, 2, None), ("train", 2, 2, None), ("unlabelled", 1, None, None)])
    assert found.problems == [] and found.shapes == "" and found.where == str(tmp_path)
    assert {split: len(dataset) for split, dataset in how_to_read(found).items()} == {
        row[0]: row[1] for row in rows(found)
    }


def test_what_is_wrong_with_folders_is_told(tmp_path):
    pictures(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg")
    (tmp_path / "test" / "cat" / "2.jpg").write_bytes(b"no image")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    found = look(tmp_path)
    assert len(found.problems) == 2
    assert "val: Class folder" in found.problems[0] and "holds no images" in found.problems[0]
    assert "test/cat/2.jpg does not decode" in found.problems[1]
    assert any(note.startswith("test and train differ in their classes (dog)") for note in found.notes)


def quantiles(values):
    """As `DetectionSet` keeps numbers, to the four digits that are shown."""
    return [f"{value:.4g}" for value in np.percentile(np.float32(values), [5, 25, 50, 75, 95])]


def shown(found, split, what):
    line = next(line for line in found.shapes.splitlines() if line.startswith(f"{split} ") and what in line)
    return line.rsplit(maxsplit=5)[1:]


@pytest.fixture
def street(tmp_path):
    """Boxes in COCO's format: street/annotations/{train,test}.json, of the same file names, and street/images."""
    boxes = {"train": [(1, 1, 4, 9), (2, 2, 8, 2), (0, 0, 20, 5), (3, 3, 2, 2)], "test": [(0, 0, 20, 16)]}
    for split, written in boxes.items():
        pictures(tmp_path / "street" / "images", *(f"{split}{number}.jpg" for number in range(2)))
        images = [{"id": n, "file_name": f"{split}{n}.jpg", "width": 20, "height": 16} for n in range(2)]
        content = {"images": images, "annotations": [], "categories": [{"id": 3, "name": "car"}]}
        for number, box in enumerate(written):
            content["annotations"].append({"id": number, "image_id": 0, "category_id": 3, "bbox": list(box)})
        if split == "train":  # a crowd, which is not trained on
            content["annotations"].append(
                {"id": 99, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 16], "iscrowd": 1}
            )
        (tmp_path / "street" / "annotations").mkdir(exist_ok=True)
        (tmp_path / "street" / "annotations" / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "street" / "annotations" / "captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    return tmp_path / "street"


def test_a_folder_with_annotations_as_json_is_counted_and_its_boxes_are_measured(street):
    found = look(street)
    assert rows(found) == [("test", 2, 1, 1), ("train", 2, 1, 5)] and found.problems == []
    assert shown(found, "train", "sqrt(") == quantiles(np.sqrt([36, 16, 100, 4]))
    assert shown(found, "train", "height / width") == quantiles([9 / 4, 2 / 8, 5 / 20, 1])
    assert shown(found, "test", "sqrt(") == quantiles([np.sqrt(320)])
    assert shown(found, "train", "shorter side") == quantiles([16, 16])
    assert {split: len(dataset.boxes) for split, dataset in how_to_read(found).items()} == {"test": 1, "train": 5}


def test_a_json_file_is_looked_at_alone_with_its_images_beside_or_named(street, tmp_path):
    file = street / "annotations" / "train.json"
    assert rows(look(file)) == [("train", 2, 1, 5)]
    (street / "images").rename(tmp_path / "far")
    (tmp_path / "deep").mkdir()
    shutil.move(street, tmp_path / "deep")
    file = tmp_path / "deep" / "street" / "annotations" / "train.json"
    with pytest.raises(DatasetError, match=r"such as train0.jpg, are not around it. .*--images FOLDER"):
        look(file)
    assert look(file, images=tmp_path / "far").problems == []
    with pytest.raises(DatasetError, match="have no list 'categories'"):
        look(file.with_name("captions.json"))


def test_images_that_lie_beside_their_json_file_are_found_though_splits_share_names(tmp_path):
    write_coco_detection(tmp_path)
    for place in ("train2017", "val2017"):
        file = tmp_path / "coco" / "annotations" / f"instances_{place}.json"
        assert splits_of(file)[file.stem]["images"] == f"../{place}"
    for split, name in (("train2017", "train"), ("val2017", "valid")):  # as Roboflow exports
        shutil.move(tmp_path / "coco" / split, tmp_path / "export" / name)
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        shutil.move(file, tmp_path / "export" / name / "_annotations.coco.json")
    found = look(tmp_path / "export")
    assert rows(found) == [("train/_annotations.coco", 3, 1, 3), ("valid/_annotations.coco", 2, 1, 2)]
    (problem,) = found.problems
    assert "1 objects with an impossible box" in problem and "annotation 4 (id 918)" in problem


def test_class_folders_with_a_json_file_of_something_else_are_class_folders(tmp_path):
    pictures(tmp_path, "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "export.json").write_text('{"tool": "camera"}')
    assert rows(look(tmp_path)) == [("images", 2, 2, None)]
    with pytest.raises(DatasetError, match="--images goes with annotations in COCO's format"):
        look(tmp_path, images=tmp_path)


@pytest.mark.parametrize("name", [".", "VOCdevkit", "VOCdevkit/VOC2007", "renamed"])
def test_a_devkit_is_recognised_from_each_of_its_folders(tmp_path, name):
    WRITERS["voc2007_classification"](tmp_path)
    year = tmp_path / "VOCdevkit" / "VOC2007"
    if name == "renamed":
        year = year.rename(tmp_path / "renamed")
    found = look(tmp_path / name)
    assert [row[:2] for row in rows(found)] == [("train", 18), ("trainval", 30), ("val", 12), ("test", 15)]
    assert found.problems == [] and "box: height / width" in found.shapes
    assert {split: len(dataset) for split, dataset in how_to_read(found).items()}["trainval"] == 30
    victim, annotation = sorted((year / "JPEGImages").iterdir())[0], sorted((year / "Annotations").iterdir())[1]
    victim.write_bytes(b"")
    annotation.write_text("<annotation>")
    problems = look(tmp_path / name).problems
    assert sum(str(victim) in problem for problem in problems) == 1  # though two splits hold it
    assert sum("images with an unreadable annotation" in problem for problem in problems) == 2


def test_two_years_are_told_apart_and_lists_of_other_names_are_taken(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        WRITERS["voc2007_classification"](tmp_path, f"VOCdevkit/{year}")
    assert {row[0] for row in rows(look(tmp_path))} >= {"VOC2007 train", "VOC2012 train"}
    lists = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "morning.txt")
    kept = {"morning"}
    for file in lists.glob("*.txt"):
        if file.stem not in kept:
            file.unlink()
    assert [row[0] for row in rows(look(lists.parents[1]))] == ["morning"]
    (lists / "morning.txt").unlink()
    with pytest.raises(DatasetError, match="no list of a split"):
        look(lists.parents[1])


def test_shards_are_checked_as_before(tmp_path):
    pictures(tmp_path / "images", "a.jpg", "b.jpg", "c.jpg")
    pack_folder(tmp_path / "images", tmp_path / "shards", "s", 2, None, 0, "error", 0)
    found = look(tmp_path / "shards")
    assert found.where == f"{tmp_path / 'shards'}: 2 shards, 3 images" and found.problems == found.found == []


def test_what_is_not_known_is_refused_with_what_is(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for path, message in (("empty", "is not known"), ("notes.txt", "is not known"), ("gone", "There is no")):
        with pytest.raises(DatasetError, match=f"{message}.*class folders.*COCO's format"):
            look(tmp_path / path)
