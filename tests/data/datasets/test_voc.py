import logging

import pytest
import torch
from hostile_input import SPECIAL_FILES, time_limit
from PIL import Image

from bissl_zoo.data import VOC_CLASSES, VOCDetection
from bissl_zoo.data.datasets.voc import read_annotation
from bissl_zoo.errors import DatasetError


def thing(name, box, difficult=None):
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    # VOC's "part" elements hold names and boxes that are not objects
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name>{flag}<bndbox>{sides}</bndbox>{part}</object>"


def add(year, name, objects, size=(50, 40), splits=("train",)):
    """One image with its annotation, in the split lists."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(year / "JPEGImages" / f"{name}.jpg")
    xml = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{''.join(objects)}"
    (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    for split in splits:
        with open(year / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")


@pytest.fixture
def devkit(tmp_path, monkeypatch):
    """A set of two training images and a test image, in the years' own folders."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    year = tmp_path / "VOCdevkit" / "VOC2007"
    add(year, "000001", [thing("dog", (1, 1, 50, 40), 0), thing("cat", (11, 5, 20, 10), 1)])
    add(year, "000002", [])
    add(year, "000003", [thing("bird", (2, 2, 9, 9))], splits=("test",))
    return year


def damage(devkit, objects, size=(50, 40)):
    """Replace the annotation of image 000001 and return its path."""
    path = devkit / "Annotations" / "000001.xml"
    dimensions = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(f"<annotation>{dimensions}{''.join(objects)}</annotation>")
    return path


def test_target_holds_zero_based_boxes_with_the_far_edges_outside(devkit):
    dataset = VOCDetection(splits=["2007_train"])
    image, target = dataset[0]
    assert (image.mode, image.size, len(dataset)) == ("RGB", (50, 40), 2)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[0, 0, 50, 40], [10, 4, 20, 10]]
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [2, 1]
    assert target["difficult"].tolist() == [False, True]
    assert target["image_id"] == 0
    assert dataset.source(0) == str(devkit / "JPEGImages" / "000001.jpg")


def test_classes_come_from_the_whole_year_so_that_train_and_test_agree(devkit):
    train, test = VOCDetection(splits="2007_train"), VOCDetection(splits="2007_test")
    assert train.classes == test.classes == ["bird", "cat", "dog"]
    assert test.target(0)["labels"].tolist() == [0] and train.target(1)["boxes"].shape == (0, 4)


def test_classes_may_be_given_or_be_those_of_voc(devkit):
    assert VOCDetection(splits=["2007_train"], classes=["dog", "cat"]).target(0)["labels"].tolist() == [0, 1]
    dataset = VOCDetection(splits=["2007_train"], classes="voc")
    assert dataset.classes == list(VOC_CLASSES) and len(VOC_CLASSES) == 20
    assert dataset.target(0)["labels"].tolist() == [VOC_CLASSES.index("dog"), VOC_CLASSES.index("cat")]
    with pytest.raises(DatasetError, match="names dog more than once"):
        VOCDetection(splits=["2007_train"], classes=["dog", "cat", "dog"])
    with pytest.raises(DatasetError, match='classes is "coco"'):
        VOCDetection(splits=["2007_train"], classes="coco")


def test_splits_of_several_years_are_joined(devkit):
    add(devkit.parent / "VOC2012", "2012_000001", [thing("sheep", ("1.5", "0", "10.25", "9"))], splits=["trainval"])
    dataset = VOCDetection(splits=["2007_train", "2012_trainval"])
    assert len(dataset) == 3 and dataset.classes == ["bird", "cat", "dog", "sheep"]
    assert dataset[2][1]["boxes"].tolist() == [[0.5, 0, 10.25, 9]]  # a minimum of 0 stays 0
    assert dataset[2][1]["image_id"] == 2


def test_unlabelled_reads_no_annotations(devkit):
    (devkit / "Annotations" / "000001.xml").write_text("no XML")
    dataset = VOCDetection(splits=["2007_train"], labelled=False)
    image, target = dataset[0]
    assert image.size == (50, 40) and target is None and dataset.classes is None and dataset.target(0) is None


def test_exif_orientation_does_not_turn_the_image_away_from_its_boxes(devkit):
    image = Image.new("RGB", (50, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(devkit / "JPEGImages" / "000001.jpg", exif=exif)
    assert VOCDetection(splits=["2007_train"])[0][0].size == (50, 40)


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ([thing("dog", (1, 1, 9, 9))] * 2 + [thing("dog", (1, 1, 512, 9))],
         "object 3: xmax 512 lies outside the image (width 50)"),
        ([thing("dog", (9, 1, 3, 9))], "object 1: the box has no area (xmin 9, ymin 1, xmax 3, ymax 9)"),
        ([thing("dog", (1, "nan", 12, 4))], "object 1: ymin is missing or not a number"),
        ([thing("dgo", (1, 1, 9, 9))], "object 1: unknown class 'dgo'. Did you mean 'dog'? The classes are cat, dog"),
    ],
)  # fmt: skip
def test_impossible_object_is_named_with_file_and_number(devkit, objects, problem):
    path = damage(devkit, objects)
    with pytest.raises(DatasetError) as caught:
        VOCDetection(splits=["2007_train"], classes=["cat", "dog"])
    message = str(caught.value)
    assert message.startswith(f"VOC annotation {path}, ") and problem in message
    assert 'on_bad_annotation="skip"' in message


def test_a_long_class_name_with_control_characters_is_shortened_and_escaped_in_the_message(devkit):
    damage(devkit, [thing("\x9b31m" + "x" * 100_000, (1, 1, 9, 9))])
    with pytest.raises(DatasetError, match=r"object 1: unknown class '\\x9b31mxxx") as caught:
        VOCDetection(splits=["2007_train"], classes=["cat", "dog"])
    assert len(str(caught.value)) < 1000


def test_skip_leaves_bad_objects_out_and_counts_them(devkit, caplog):
    damage(devkit, [thing("dog", (1, 1, 512, 9)), thing("cat", (2, 2, 9, 9)), thing("cow", (2, 2, 9, 9))])
    with caplog.at_level(logging.WARNING):
        dataset = VOCDetection(splits=["2007_train"], classes=["cat", "dog"], on_bad_annotation="skip")
    assert len(dataset) == 2
    assert dataset.target(0)["boxes"].tolist() == [[1, 1, 9, 9]] and dataset.target(0)["labels"].tolist() == [0]
    assert "left out 2 objects" in caplog.text


BOMB = '<!DOCTYPE a [<!ENTITY x "x"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("<annotation><size>", "does not parse"),
        (BOMB, "is refused: it defines XML entities"),
        (EXTERNAL, "is refused: it defines XML entities"),
        ("<annotation><size><width>0</width><height>0</height></size></annotation>", "gives no image size"),
        (None, "does not exist"),
    ],
)
def test_unreadable_annotation_is_named_or_its_image_skipped(devkit, caplog, content, problem):
    path = devkit / "Annotations" / "000001.xml"
    path.unlink()
    if content is not None:
        path.write_text(content)
    for classes in (None, ["bird", "cat", "dog"]):
        with pytest.raises(DatasetError, match=f"VOC annotation {path} {problem}.*skip"):
            VOCDetection(splits=["2007_train"], classes=classes)
        caplog.clear()
        dataset = VOCDetection(splits=["2007_train"], classes=classes, on_bad_annotation="skip")
        assert [dataset.source(i)[-10:] for i in range(len(dataset))] == ["000002.jpg"]
        assert "left out 1 images with an unreadable annotation" in caplog.text


def test_a_huge_annotation_is_refused_unread(devkit):
    path = damage(devkit, [])
    with open(path, "r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(DatasetError, match=rf"{path} has more than 10,000,000 bytes, so it is not read\. Fix the file"):
        VOCDetection(splits=["2007_train"])


def test_a_deeply_nested_annotation_is_read(devkit):
    path = damage(devkit, ["<a>" * 20_000 + "</a>" * 20_000, thing("dog", (1, 1, 9, 9))])
    assert read_annotation(path).names == ["dog"]


def test_a_listed_image_that_does_not_exist_or_is_elsewhere_is_named_or_skipped(devkit, caplog):
    elsewhere = str(devkit / "JPEGImages" / "000001").encode()
    for name in (b"000009", b"../../secret", elsewhere, b"\xff\xfe"):
        (devkit / "ImageSets" / "Main" / "train.txt").write_bytes(b"000002\n" + name + b"\n")
        with pytest.raises(DatasetError, match="listed in .*train.txt, does not exist"):
            VOCDetection(splits=["2007_train"])
    assert len(VOCDetection(splits=["2007_train"], on_bad_annotation="skip")) == 1
    assert "left out 1 images without a file" in caplog.text
    (devkit / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(DatasetError, match="2007_train hold no usable image"):
        VOCDetection(splits=["2007_train"], on_bad_annotation="skip")


def test_the_three_folders_are_read_by_splits_without_a_year(devkit, tmp_path, monkeypatch):
    whole = VOCDetection(splits=["2007_train"])
    devkit.rename(tmp_path / "cells")
    for root in ("cells", str(tmp_path / "cells")):
        own = VOCDetection(root=root, splits=["train"])
        assert len(own) == len(whole) and own.classes == whole.classes
        assert own.source(0) == str(tmp_path / "cells" / "JPEGImages" / "000001.jpg")
    with pytest.raises(DatasetError, match=r"trian.txt does not exist. Did you mean 'train'"):
        VOCDetection(root="cells", splits=["trian"])


def test_empty_split_missing_split_and_malformed_split_are_refused(devkit):
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(DatasetError, match=r"val.txt is empty"):
        VOCDetection(splits=["2007_val"])
    with pytest.raises(DatasetError, match=r"trian.txt does not exist. Did you mean 'train'\? There: test, train, val"):
        VOCDetection(splits=["2007_trian"])
    with pytest.raises(DatasetError, match="VOC split 'train' is not '<year>_"):
        VOCDetection(splits=["train"])
    with pytest.raises(DatasetError, match="list .*000001.jpg more than once"):
        VOCDetection(splits=["2007_train", "2007_train"])
    with pytest.raises(DatasetError, match="no split"):
        VOCDetection(splits=[])


def test_a_missing_set_names_its_folder_and_the_command_that_fetches_it_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    with pytest.raises(DatasetError, match=f"(?s){tmp_path}/VOCdevkit/VOC2012.*bissl data voc_detection"):
        VOCDetection(splits=["2012_trainval"])
    with pytest.raises(DatasetError) as caught:
        VOCDetection(root="cells", splits=["2007_train"])
    assert str(tmp_path / "cells" / "VOCdevkit" / "VOC2007") in str(caught.value)
    assert "prepare_data" not in str(caught.value)


def test_image_of_another_size_than_annotated_is_refused_when_read(devkit):
    damage(devkit, [], size=(64, 40))
    with pytest.raises(DatasetError, match="000001.jpg has 50 x 40 pixels, but its annotation has 64 x 40"):
        VOCDetection(splits=["2007_train"])[0]
    damage(devkit, [], size=(40, 50))  # as drawn on the image that a viewer turns
    with pytest.raises(DatasetError, match="000001.jpg has 50 x 40 pixels.* has 40 x 50.*EXIF orientation"):
        VOCDetection(splits=["2007_train"])[0]


def test_an_id_of_two_files_is_refused_or_skipped(devkit):
    Image.new("RGB", (50, 40)).save(devkit / "JPEGImages" / "000001.png")
    with pytest.raises(DatasetError, match=r"VOC image '000001', listed in .*, may be 000001\.jpg or 000001\.png in "):
        VOCDetection(splits=["2007_train"])
    assert VOCDetection(splits=["2007_train"], on_bad_annotation="skip").source(0).endswith("000002.jpg")


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_pipe_or_device_in_place_of_an_annotation_is_refused_at_once(devkit, kind):
    path = devkit / "Annotations" / "000001.xml"
    path.unlink()
    SPECIAL_FILES[kind](path)
    with time_limit(), pytest.raises(DatasetError, match=f"{path} is not a regular file"):
        VOCDetection(splits=["2007_train"])
