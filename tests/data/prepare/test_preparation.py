import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torchvision.datasets as tv
from faulty_server import Answer, FaultyServer
from original_layouts import CALTECH, WRITERS, sizes_of, write_coco_detection
from scipy.io import savemat

from bissl_zoo.config import LazyConfig, config_root
from bissl_zoo.data.datasets.classification_sets import CLASSIFICATION_SETS
from bissl_zoo.data.prepare import known as preparation
from bissl_zoo.data.prepare.downloads import SOURCES, from_archive
from bissl_zoo.data.prepare.known import catalog, listing, prepare, survey
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import DATASETS

NAMES = sorted(CLASSIFICATION_SETS)
CLASSES = {"voc2007_classification": 20, "flowers102": 102, "fashion_mnist": 10}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A data sets root in which small sets count as the originals."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    for name, layout in CLASSIFICATION_SETS.items():
        numbers = {"parts": sizes_of(name), "classes": CLASSES.get(name, 3)}
        monkeypatch.setitem(CLASSIFICATION_SETS, name, layout._replace(**numbers))
    return root


def counts(found):
    return {one.split: one.images for one in found.found}


def test_everything_in_the_catalog_is_registered_and_says_where_it_comes_from():
    assert catalog().keys() == SOURCES.keys() == set(WRITERS) | {"voc_detection", "coco_detection"}
    for name, entry in catalog().items():
        assert name in DATASETS
        source = SOURCES[name]
        assert source.page.startswith("http") and source.by_hand
        # what is fetched is where the set is looked for
        assert any(entry.folder == piece or entry.folder in piece or piece in entry.folder for piece in source.pieces)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_set_is_found_whole(name, small):
    WRITERS[name](small)
    fetched, found = prepare(name)
    sizes = sizes_of(name)
    trainval = sizes.get("trainval") or sizes["train"] + sizes["val"]
    assert fetched == [] and found.problems == [] and found.notes == []
    assert counts(found).items() >= {**sizes, "trainval": trainval}.items()
    assert counts(found)["train"] + counts(found)["val"] == trainval
    assert {one.classes for one in found.found if one.split != "unlabeled"} == {CLASSES.get(name, 3)}
    assert f"{trainval}" in found.table() and "boxes" not in found.table()
    assert survey(name, open_files=True, num_workers=0).problems == []


@pytest.mark.parametrize("name", ["food101", "dtd", "imagenet", "caltech101", "voc2007_classification"])
def test_every_file_that_does_not_open_is_named(name, small):
    WRITERS[name](small)
    victims = []
    for split in ("train", "test"):
        victims.append(DATASETS.build(name, split=split).source(2))
        content = open(victims[-1], "rb").read()
        with open(victims[-1], "wb") as file:
            file.write(content[: len(content) // 2])
    assert survey(name).problems == []
    for workers in (0, 2):
        problems = survey(name, open_files=True, num_workers=workers).problems
        assert len(problems) == 2
        for victim, problem in zip(victims, problems, strict=True):
            assert f"Image {victim} does not decode" in problem


def test_what_an_interrupted_download_has_left_is_found_out(small):
    WRITERS["caltech101"](small)
    (small / "caltech101" / "101_ObjectCategories" / "moa" / f"image_{CALTECH:04d}.jpg").unlink()
    assert prepare("caltech101")[1].problems == ["caltech101, split test: 14 images, but the original has 15."]
    shutil.rmtree(small / "caltech101" / "101_ObjectCategories" / "moa")
    problems = prepare("caltech101")[1].problems
    assert "caltech101, split test: 2 classes, but the original has 3." in problems
    WRITERS["food101"](small)
    shutil.rmtree(small / "food-101" / "images" / "moa")
    assert all("does not exist, and 9 more" in text or "and 4 more" in text for text in prepare("food101")[1].problems)
    assert len(prepare("food101")[1].problems) == 4
    problems = survey("food101", open_files=True, num_workers=0).problems
    folder = small / "food-101" / "images" / "moa"
    numbers = [*range(10), *range(100, 105)]
    assert sorted(problems) == sorted(f"Image {folder / f'{number}.jpg'} does not exist." for number in numbers)


def test_images_that_two_splits_share_are_told(small):
    WRITERS["dtd"](small)
    labels = small / "dtd" / "dtd" / "labels"
    shutil.copy(labels / "train1.txt", labels / "test1.txt")
    problems = survey("dtd", open_files=True, num_workers=0).problems
    assert "dtd: 18 images are both in trainval and in test." in problems


def test_what_is_not_known_is_told_with_the_nearest():
    for look in (prepare, survey):
        with pytest.raises(DatasetError, match="There is no data set 'oxford_pet'. Did you mean 'oxford_pets'"):
            look("oxford_pet")


# detection sets


def test_detection_sets_are_counted_with_their_boxes(small, monkeypatch):
    WRITERS["voc2007_classification"](small)
    WRITERS["voc2007_classification"](small, "VOCdevkit/VOC2012")
    write_coco_detection(small)
    found, problems = survey("voc_detection", open_files=True, num_workers=0)[:2]
    assert [(one.split, one.images) for one in found] == [
        ("2007_trainval", 30),
        ("2007_test", 15),
        ("2012_trainval", 30),
    ]
    assert all(one.boxes > one.images and one.classes == 20 for one in found)
    assert len(problems) == 3 and all("but the original has" in problem for problem in problems)
    assert "boxes" in survey("voc_detection").table()
    assert survey("voc_detection").notes == []


@pytest.fixture
def coco(small, monkeypatch):
    """A small COCO that counts as the original."""
    write_coco_detection(small)
    entry = catalog()["coco_detection"]._replace(images={"train2017": 3, "val2017": 2}, classes=1)
    monkeypatch.setattr(preparation, "catalog", lambda: {"coco_detection": entry})
    return small / "coco"


def test_whole_coco_is_found_whole_for_all_its_boxes_without_height(coco):
    for looked in (survey("coco_detection", open_files=True, num_workers=0), prepare("coco_detection")[1]):
        assert looked.problems == []
        assert [tuple(one) for one in looked.found] == [("train2017", 3, 1, 3), ("val2017", 2, 1, 2)]
        (note,) = looked.notes
        assert note.startswith("coco_detection, split train2017: left out 1 objects with an impossible box")
        assert "annotation 4 (id 918): the box has no area" in note


def test_what_is_wrong_with_coco_is_still_found(coco):
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


def test_coco_is_opened_as_its_config_opens_it():
    cfg = LazyConfig.load(config_root() / "common" / "data" / "coco.py")
    for arguments, role in zip(catalog()["coco_detection"].splits.values(), ("train", "test"), strict=True):
        own = {key: value for key, value in cfg[role].dataset.items() if key not in ("_target_", "name", "root")}
        assert arguments == own


def test_the_list_reads_no_annotations_of_boxes(coco, monkeypatch):
    (coco / "annotations" / "instances_train2017.json").write_text("a list of what is there need not read this")
    assert "train2017 3, val2017 2" in listing() and "problems" not in listing()
    (coco / "annotations" / "instances_train2017.json").unlink()
    assert "val2017 2 (1 problems)" in listing()
    WRITERS["voc2007_classification"](coco.parent)
    monkeypatch.undo()
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(coco.parent))
    for file in (coco.parent / "VOCdevkit" / "VOC2007" / "Annotations").iterdir():
        file.write_text("")
    row = next(line for line in listing().splitlines() if line.startswith("voc_detection"))
    assert "2007_trainval 30, 2007_test 15" in row


# downloads, of the small sets in archives, by torchvision from a server here


def archive_of(folder):
    """A .tar.gz of a folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return stream.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves what torchvision downloads of three sets, from where it is told to."""
    for name in ("food101", "fgvc_aircraft", "fashion_mnist", "sun397"):
        WRITERS[name](tmp_path / "originals")
    originals = tmp_path / "originals"
    with FaultyServer() as server:
        food = archive_of(originals / "food-101")
        raw = originals / "FashionMNIST" / "raw"
        server.files = {
            "/food-101.tar.gz": food,
            "/aircraft.tar.gz": archive_of(originals / "fgvc-aircraft-2013b"),
            **{f"/{file.name}": file.read_bytes() for file in raw.iterdir()},
        }
        monkeypatch.setattr(tv.Food101, "_URL", f"{server.address}/food-101.tar.gz")
        monkeypatch.setattr(tv.Food101, "_MD5", hashlib.md5(food).hexdigest())
        monkeypatch.setattr(tv.FGVCAircraft, "_URL", f"{server.address}/aircraft.tar.gz")
        monkeypatch.setattr(tv.FashionMNIST, "mirrors", [f"{server.address}/"])
        sums = [(name, hashlib.md5((raw / name).read_bytes()).hexdigest()) for name, _ in tv.FashionMNIST.resources]
        monkeypatch.setattr(tv.FashionMNIST, "resources", sums)
        yield server


@pytest.mark.parametrize(
    ("name", "folder"),
    [("food101", "food-101"), ("fgvc_aircraft", "fgvc-aircraft-2013b"), ("fashion_mnist", "FashionMNIST")],
)
def test_what_is_not_there_is_downloaded_once_and_found_whole(name, folder, small, server):
    fetched, found = prepare(name)
    assert fetched == [folder] and found.problems == []
    assert os.listdir(small) == [folder]
    assert survey(name, open_files=True, num_workers=0).problems == []
    asked = len(server.requests)
    assert prepare(name) == ([], found) and len(server.requests) == asked


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(("name", "file"), [("food101", "/food-101.tar.gz"), ("fgvc_aircraft", "/aircraft.tar.gz")])
def test_a_download_that_is_interrupted_leaves_nothing_and_is_done_again(name, file, end, small, server):
    # the first request asks for redirections only
    server.plans[file] = [Answer(), Answer(sends=len(server.files[file]) // 2, end=end)] * 2
    with pytest.raises(DatasetError) as caught:
        prepare(name)
    assert f"{name} is not downloaded" in str(caught.value) and SOURCES[name].page in str(caught.value)
    assert os.listdir(small) == []
    server.plans.clear()
    assert prepare(name)[1].problems == []


def test_a_process_that_was_killed_over_a_download_leaves_nothing_in_the_way(small, server):
    # what it leaves: half an archive, which torchvision takes for a whole one, and half of its folder
    hidden = small / ".downloading-fgvc_aircraft"
    (hidden / "fgvc-aircraft-2013b" / "data").mkdir(parents=True)
    (hidden / "aircraft.tar.gz").write_bytes(gzip.compress(b"half"))
    assert not preparation.folder_of("fgvc_aircraft").is_dir()
    assert prepare("fgvc_aircraft")[1].problems == []
    assert os.listdir(small) == ["fgvc-aircraft-2013b"]


def test_a_second_piece_is_fetched_where_only_the_first_is_there(small, server, tmp_path, monkeypatch):
    shutil.copytree(tmp_path / "originals" / "SUN397", small / "SUN397")
    lists = small / "SUN397" / "Partitions"
    archive = shutil.make_archive(str(tmp_path / "Partitions"), "zip", lists)
    shutil.rmtree(lists)
    server.files["/Partitions.zip"] = open(archive, "rb").read()
    bring = from_archive(f"{server.address}/Partitions.zip", None, "SUN397/Partitions")
    pieces = {**SOURCES["sun397"].pieces, "SUN397/Partitions": bring}
    monkeypatch.setitem(SOURCES, "sun397", SOURCES["sun397"]._replace(pieces=pieces))
    fetched, found = prepare("sun397")
    assert fetched == ["SUN397/Partitions"] and found.problems == []


def test_the_archives_of_imagenet_are_unpacked_and_sorted(small, tmp_path, monkeypatch):
    WRITERS["imagenet"](tmp_path)
    original, archives = tmp_path / "imagenet", small / "imagenet"
    archives.mkdir(parents=True)
    inner = tmp_path / "inner"
    inner.mkdir()
    for place in (original / "train").iterdir():
        shutil.make_archive(str(inner / place.name), "tar", place)
    shutil.make_archive(str(archives / "ILSVRC2012_img_train"), "tar", inner)
    heap, wordnet = tmp_path / "heap", ["n01440764", "n01443537", "n02102040"]
    heap.mkdir()
    images = sorted((original / "val").rglob("*.JPEG"), key=lambda image: image.name)
    for image in images:
        shutil.copy(image, heap)
    shutil.make_archive(str(archives / "ILSVRC2012_img_val"), "tar", heap)
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    synsets = [(n, wnid, f"{wnid}, thing", "a thing", 0) for n, wnid in enumerate(wordnet, 1)]
    savemat(devkit / "meta.mat", {"synsets": np.array([*synsets, (4, "n00001740", "entity", "all", 3)], fields)})
    truth = [wordnet.index(image.parent.name) + 1 for image in images]
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{label}\n" for label in truth))
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(archive_of(devkit.parent))
    sums = {
        part: (name, hashlib.md5((archives / name).read_bytes()).hexdigest())
        for part, (name, _) in tv.imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(tv.imagenet, "ARCHIVE_META", sums)
    fetched, found = prepare("imagenet")
    assert fetched == ["imagenet/train", "imagenet/val"] and found.problems == []
    for split, place in (("trainval", "train"), ("test", "val")):
        unpacked, expected = (DATASETS.build("imagenet", split=split, root=root) for root in (None, str(original)))
        assert unpacked.digest() == expected.digest(), place
    assert sorted(os.listdir(small)) == ["imagenet"] and len(os.listdir(archives)) == 5


def test_what_no_program_downloads_is_told_with_its_files(small):
    with pytest.raises(DatasetError) as caught:
        prepare("stanford_cars")
    for file in ("cars_train_annos.mat", "cars_meta.mat", "cars_test_annos_withlabels.mat", str(small)):
        assert file in str(caught.value)
    with pytest.raises(DatasetError) as caught:
        prepare("imagenet")
    for file in ("ILSVRC2012_img_train.tar does not exist", "ILSVRC2012_devkit_t12.tar.gz", "image-net.org"):
        assert file in str(caught.value)
    assert os.listdir(small) == []


def test_a_set_that_is_where_the_official_archive_unpacks_is_not_fetched(small):
    WRITERS["dtd"](small)
    (small / "dtd" / "dtd").rename(small / "moved")
    (small / "dtd").rmdir()
    (small / "moved").rename(small / "dtd")
    WRITERS["caltech101"](small)
    (small / "caltech101").rename(small / "caltech-101")
    for name in ("dtd", "caltech101"):
        fetched, found = prepare(name)
        assert fetched == [] and found.problems == []
