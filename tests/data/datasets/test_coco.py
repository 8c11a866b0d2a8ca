import contextlib
import io
import json
import logging
import os
import re

import numpy as np
import pytest
import torch
from hostile_input import SPECIAL_FILES, time_limit
from PIL import Image
from pycocotools.coco import COCO

from bissl_zoo.data import COCODetection
from bissl_zoo.errors import DatasetError

SIZES = {11: (50, 40), 3: (64, 48), 25: (30, 60), 4: (20, 20)}
CATEGORIES = [
    {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 18, "name": "dog", "supercategory": "animal"},
]


def box(key, image, category, bbox, **more):
    polygon = [[bbox[0], bbox[1], bbox[0] + 1, bbox[1], bbox[0], bbox[1] + 1]]
    area = bbox[2] * bbox[3]
    record = {"id": key, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0}
    return {**record, "segmentation": polygon, **more}


@pytest.fixture
def content():
    """Return annotations in which image 4 has no objects and those of the other images are mixed."""
    files = [{"id": key, "file_name": f"{key:012d}.jpg", "width": w, "height": h} for key, (w, h) in SIZES.items()]
    objects = [
        box(7, 11, 18, [0, 0, 50, 40]),
        box(2, 3, 90, [10.25, 4.5, 20.01, 30.75]),
        box(5, 11, 1, [11, 5, 9.5, 10], iscrowd=1, segmentation={"counts": [1900, 100], "size": [40, 50]}),
        box(900, 25, 18, [2, 3, 4, 5]),
        box(3, 3, 1, [0, 47, 64, 1]),
    ]
    return {"info": {"year": 2017}, "images": files, "annotations": objects, "categories": CATEGORIES}


@pytest.fixture
def folder(tmp_path, monkeypatch, content):
    """Write a set in COCO's layout."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for key, size in SIZES.items():
        pixels = np.random.default_rng(key).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train2017" / f"{key:012d}.jpg")
    write(root, content)
    return root


def write(folder, content):
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(**arguments):
    with pytest.raises(DatasetError) as caught:
        COCODetection(**arguments)
    return str(caught.value)


def test_targets_are_those_that_pycocotools_reads_from_the_same_file(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(folder / "annotations" / "instances_train2017.json")
    dataset = COCODetection()
    assert len(dataset) == 4
    assert dataset.classes == [one["name"] for one in reference.loadCats(sorted(reference.getCatIds()))]
    for index, image in enumerate(reference.loadImgs(reference.getImgIds())):
        assert dataset.source(index) == str(folder / "train2017" / image["file_name"])
        expected = reference.loadAnns(reference.getAnnIds(image["id"]))
        picture, target = dataset[index]
        assert (picture.mode, picture.size) == ("RGB", (image["width"], image["height"]))
        corners = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in expected)]
        assert torch.equal(target["boxes"], torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
        names = [reference.loadCats(one["category_id"])[0]["name"] for one in expected]
        assert [dataset.classes[label] for label in target["labels"]] == names
        assert target["difficult"].tolist() == [bool(one["iscrowd"]) for one in expected]
        assert target["image_id"] == index


def test_chosen_classes_give_the_labels_and_objects_of_others_are_counted(folder, caplog):
    dataset = COCODetection(classes=["dog", "boat", "person"])
    assert dataset.classes == ["dog", "boat", "person"] and len(dataset) == 4
    assert dataset.target(0)["labels"].tolist() == [0, 2] and dataset.target(1)["labels"].tolist() == [2]
    assert "left out 1 objects of other classes" in caplog.text
    assert "has no category boat; no image has such objects" in caplog.text


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        (["dog", "preson"], r"have no category 'preson'\. Did you mean 'person'\?"),
        (["zebra"], "have no category 'zebra'"),
        (["dog", "dog"], "classes names dog more than once"),
        ("dog", 'classes is "dog"; give a list of names'),
    ],
)
def test_unknown_classes_are_refused(folder, classes, problem):
    assert re.search(problem, refusal(classes=classes))


def test_unlabelled_reads_the_list_of_images_alone(folder, content):
    bare = [{"id": one["id"], "file_name": one["file_name"]} for one in content["images"]]
    write(folder, {"images": bare, "annotations": "none"})
    dataset = COCODetection(labelled=False)
    image, target = dataset[0]
    assert len(dataset) == 4 and image.size == (50, 40)
    assert target is None and dataset.classes is None and dataset.target(0) is None


def test_images_may_lie_in_folders_below_with_ids_of_text_and_a_byte_order_mark(folder, content):
    for one in content["images"]:
        one["id"] = f"image {one['id']}"
    for one in content["annotations"]:
        one["image_id"] = f"image {one['image_id']}"
    (folder / "train2017" / "more").mkdir()
    os.rename(folder / "train2017" / "000000000003.jpg", folder / "train2017" / "more" / "a b.jpg")
    content["images"][1]["file_name"] = "more/a b.jpg"
    path = write(folder, content)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert COCODetection()[1][0].size == (64, 48) and COCODetection().target(0)["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("bbox", "kept"),
    [
        ([0.0, 0.0, 50.01, 40.004], [0, 0, 50, 40]),
        ([-0.01, -1, 10, 11], [0, 0, 9.99, 10]),
        ([10, 10, 41, 31], [10, 10, 50, 40]),
    ],
)
def test_box_that_exceeds_its_image_by_rounding_or_one_pixel_is_cut_off(folder, content, bbox, kept):
    content["annotations"] = [box(1, 11, 1, bbox)]
    write(folder, content)
    assert COCODetection().target(0)["boxes"].tolist() == [pytest.approx(kept)]


BAD_OBJECTS = {
    "zero height": ({"bbox": [5, 6, 7, 0.0]}, "the box has no area (x 5, y 6, width 7, height 0)"),
    "outside": ({"bbox": [5, 6, 47, 3]}, "the box (x 5, y 6, width 47, height 3) lies outside the image (50 x 40)"),
    "all in the margin": ({"bbox": [50.2, 6, 0.5, 3]}, "the box has no area (x 50.2, y 6, width 0.5, height 3) in the"),
    "NaN": ({"bbox": [5, float("nan"), 7, 3]}, "bbox is missing, or not four numbers"),
    "without end": ({"bbox": [5, 6, 10**400, 3]}, "bbox is missing, or not four numbers"),
    "unknown image": ({"image_id": 12}, "image_id 12 is no image of the file"),
    "image that is a list": ({"image_id": [11]}, "image_id is missing, or neither a whole number nor text"),
    "unknown category": ({"category_id": 2}, "category_id 2 is no category of the file"),
    "repeated id": ({"id": 7}, "its id was there before"),
    "strange crowd": ({"iscrowd": "yes"}, "iscrowd is 'yes'; accepted are 0 and 1"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_impossible_object_is_named_or_skipped(folder, content, changes, problem, caplog):
    content["annotations"].append(box(901, 11, 1, [1, 1, 2, 2]) | changes)
    path = write(folder, content)
    message = refusal()
    assert message.startswith(f"COCO annotations {path}, annotation 6") and problem in message
    assert 'on_bad_annotation="skip"' in message
    with caplog.at_level(logging.WARNING):
        dataset = COCODetection(on_bad_annotation="skip")
    assert sum(len(dataset.target(i)["labels"]) for i in range(4)) == 5
    assert "left out 1 objects with an impossible box, id, image or category" in caplog.text


BAD_IMAGES = {
    "missing": ({"file_name": "gone.jpg"}, "there is no such file in "),
    "above": ({"file_name": "../train2017/000000000011.jpg"}, "its file_name leads out of "),
    "absolute": ({"file_name": "/etc/passwd"}, "its file_name leads out of "),
    "another's": ({"file_name": "./000000000003.jpg"}, "another image is the same file"),
    "NUL": ({"file_name": "a\0.jpg"}, "its file_name is missing or no name of a file"),
    "half a surrogate pair": ({"file_name": "\ud800.jpg"}, "its file_name is missing or no name of a file"),
    "size zero": ({"height": 0}, "it has no size"),
    "a size without end": ({"height": 10**400}, "it has no size"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_image_that_cannot_be_used_is_named_or_skipped_with_its_objects(folder, content, changes, problem, caplog):
    content["images"].append(content["images"].pop(0) | changes)
    path = write(folder, content)
    message = refusal()
    assert message.startswith(f"COCO annotations {path}, image 4 (") and problem in message
    assert 'on_bad_annotation="skip"' in message
    with caplog.at_level(logging.WARNING):
        dataset = COCODetection(on_bad_annotation="skip")
    assert [len(dataset.target(i)["labels"]) for i in range(len(dataset))] == [2, 1, 0]
    assert "left out 1 images without a usable file or record" in caplog.text
    assert "objects" not in caplog.text


def test_repeated_image_id_is_refused_even_where_bad_ones_are_skipped(folder, content):
    content["images"][2]["id"] = 11
    path = write(folder, content)
    for way in ("error", "skip"):
        message = refusal(on_bad_annotation=way)
        assert f"{path}, image 3 (id 11, file_name '000000000025.jpg'): its id was there before" in message


@pytest.mark.parametrize(
    ("category", "problem"),
    [
        ({"id": 2, "name": "dog"}, "category 4 (id 2): its id or its name, 'dog', was there before"),
        ({"id": 18, "name": "cat"}, "category 4 (id 18): its id or its name, 'cat', was there before"),
        ("cat", "category 4: it is no JSON object"),
    ],
)
def test_categories_that_are_not_distinct_or_not_named_are_refused(folder, content, category, problem):
    path = write(folder, {**content, "categories": [*CATEGORIES, category]})
    for way in ("error", "skip"):
        assert refusal(on_bad_annotation=way) == f"COCO annotations {path}, {problem}. Fix the file."


BAD_FILES = {
    "cut short": ('{"images": [', "cannot be read as JSON: Expecting value"),
    "deeply nested": ('{"images": ' + "[" * 200_000, "cannot be read as JSON: it is nested"),
    "a number without end": ('{"images": [' + "9" * 5000 + "]}", "cannot be read as JSON: Exceeds the limit"),
    "a list, as results are": ("[]", "have no list 'images'"),
    "no categories": ('{"images": [], "annotations": []}', "have no list 'categories'"),
    "no image": (
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        "hold no usable image",
    ),
}


@pytest.mark.parametrize(("text", "problem"), BAD_FILES.values(), ids=BAD_FILES)
def test_file_that_is_not_in_the_format_is_named(folder, text, problem):
    path = write(folder, text)
    for way in ("error", "skip"):
        assert refusal(on_bad_annotation=way).startswith(f"COCO annotations {path} {problem}")


def test_a_huge_file_is_refused_unread(folder, content):
    path = write(folder, content)
    with open(path, "r+b") as stream:
        stream.truncate(9 << 30)
    assert f"{path} have more than 8,589,934,592 bytes, so they are not read" in refusal()


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_pipe_or_device_in_place_of_annotations_is_refused_at_once(folder, kind):
    path = folder / "annotations" / "instances_train2017.json"
    path.unlink()
    SPECIAL_FILES[kind](path)
    with time_limit():
        assert f"{path} is not a regular file" in refusal()
