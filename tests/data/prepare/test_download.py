"""Downloads of small sets by torchvision from a local server."""

import gzip
import hashlib
import io
import os
import tarfile

import pytest
import torchvision.datasets as tv
from faulty_server import Answer, FaultyServer
from original_layouts import WRITERS, sizes_of

from bissl_zoo.data.datasets.classification import CLASSIFICATION_SETS
from bissl_zoo.data.prepare.check import folder_of, known_sets, prepare, survey
from bissl_zoo.data.prepare.download import SOURCES
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import DATASETS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A datasets root in which small sets count as the originals."""
    root = tmp_path / "datasets"
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    for name, layout in CLASSIFICATION_SETS.items():
        changed = layout._replace(images=sizes_of(name), classes={"fashion_mnist": 10}.get(name, 3))
        monkeypatch.setitem(CLASSIFICATION_SETS, name, changed)
    return root


def test_every_known_set_is_registered_and_has_a_source():
    assert known_sets().keys() == SOURCES.keys() == set(WRITERS) | {"voc_detection", "coco_detection"}
    for name, known in known_sets().items():
        assert name in DATASETS
        source = SOURCES[name]
        assert source.page.startswith("http")
        # what is fetched is where the set is searched
        assert source.by_hand or any(known.folder in piece or piece in known.folder for piece in source.pieces)


def archive_of(folder):
    """A .tar.gz of a folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return stream.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve the files that torchvision downloads for three sets."""
    for name in ("food101", "fgvc_aircraft", "fashion_mnist"):
        WRITERS[name](tmp_path / "originals")
    originals = tmp_path / "originals"
    with FaultyServer() as server:
        food = archive_of(originals / "food-101")
        raw = {f"{file.name}.gz": gzip.compress(file.read_bytes()) for file in originals.glob("FashionMNIST/raw/*")}
        server.files = {
            "/food-101.tar.gz": food,
            "/aircraft.tar.gz": archive_of(originals / "fgvc-aircraft-2013b"),
            **{f"/{name}": content for name, content in raw.items()},
        }
        monkeypatch.setattr(tv.Food101, "_URL", f"{server.address}/food-101.tar.gz")
        monkeypatch.setattr(tv.Food101, "_MD5", hashlib.md5(food).hexdigest())
        monkeypatch.setattr(tv.FGVCAircraft, "_URL", f"{server.address}/aircraft.tar.gz")
        monkeypatch.setattr(tv.FashionMNIST, "mirrors", [f"{server.address}/"])
        sums = [(name, hashlib.md5(raw[name]).hexdigest()) for name, _ in tv.FashionMNIST.resources]
        monkeypatch.setattr(tv.FashionMNIST, "resources", sums)
        yield server


@pytest.mark.parametrize(
    ("name", "folder"),
    [("food101", "food-101"), ("fgvc_aircraft", "fgvc-aircraft-2013b"), ("fashion_mnist", "FashionMNIST")],
)
def test_a_missing_set_is_downloaded_once_and_complete(name, folder, small, server):
    fetched, result = prepare(name)
    assert fetched == [folder] and result.problems == []
    assert os.listdir(small) == [folder]
    assert survey(name, open_files=True, num_workers=0).problems == []
    asked = len(server.requests)
    assert prepare(name) == ([], result) and len(server.requests) == asked


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_interrupted_download_leaves_nothing_and_can_be_repeated(end, small, server):
    name, file = "fgvc_aircraft", "/aircraft.tar.gz"
    # the first request asks for redirections only
    server.plans[file] = [Answer(), Answer(sends=len(server.files[file]) // 2, end=end)] * 2
    with pytest.raises(DatasetError) as caught:
        prepare(name)
    assert f"Downloading {name} failed" in str(caught.value) and SOURCES[name].page in str(caught.value)
    assert os.listdir(small) == []
    server.plans.clear()
    assert prepare(name)[1].problems == []


def test_leftovers_of_a_killed_download_do_not_block_the_next_one(small, server):
    # what it leaves: half an archive, which torchvision takes for a whole one, and half of its folder
    hidden = small / ".downloading-fgvc_aircraft"
    (hidden / "fgvc-aircraft-2013b" / "data").mkdir(parents=True)
    (hidden / "aircraft.tar.gz").write_bytes(gzip.compress(b"half"))
    assert not folder_of("fgvc_aircraft").is_dir()
    assert prepare("fgvc_aircraft")[1].problems == []
    assert os.listdir(small) == ["fgvc-aircraft-2013b"]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("stanford_cars", ("cars_train_annos.mat", "cars_meta.mat", "cars_test_annos_withlabels.mat")),
        ("imagenet", ("imagenet/train", "torchvision.datasets.ImageNet", "image-net.org")),
    ],
)
def test_files_to_download_by_hand_are_listed(name, files, small):
    with pytest.raises(DatasetError) as caught:
        prepare(name)
    assert all(file in str(caught.value) for file in (*files, str(small)))
    assert not small.exists()
