"""Reading any bytes returns data or raises a BisslZooError; nothing runs, and nothing is written elsewhere.

About a thousand inputs, the same each time; BISSL_ZOO_FUZZ=100000 tries that many.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile

import pytest
import safetensors.torch
import torch
from faulty_server import Answer, FaultyServer
from hostile_grammars import (
    COCO_IMAGES,
    CONFIG,
    annotation_files,
    coco_files,
    http_answers,
    image_files,
    overrides,
    readable_images,
    yaml_files,
)
from hostile_input import NAMES, as_json, damaged, json_files, safetensors_files, watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from tiny_entries import publish_tiny

from bissl_zoo.config import LazyConfig
from bissl_zoo.data import COCODetection
from bissl_zoo.data.datasets.catalog import load_image
from bissl_zoo.data.datasets.voc import read_annotation
from bissl_zoo.engine.publishing import published
from bissl_zoo.errors import BisslZooError
from bissl_zoo.progress.writers import drop_lines_after
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint
from bissl_zoo.runs.directory import add_wall_time, read_metadata
from bissl_zoo.weights.load import read_weights
from bissl_zoo.zoo import get_config, list_backbones, load_entry_weights, read_entry
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import check_name, is_name, parse_index, split_version

pytestmark = pytest.mark.slow

TARGETS = 14
fuzzing = settings(
    max_examples=int(os.environ.get("BISSL_ZOO_FUZZ", "1000")) // TARGETS,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The one folder that may be written to; temporary files of the library belong there too."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setattr(sys, "dont_write_bytecode", True)
        yield folder


def encoded(text):
    return text.encode("utf-8", "surrogatepass")


def read(place, call, *arguments, longest=20_000, port=None):
    """Return what a call returns, or None if it raises a BisslZooError with a short message."""
    with watched(place, port):
        try:
            return call(*arguments)
        except BisslZooError as error:
            assert 0 < len(str(error)) < longest
            return None


@pytest.fixture(scope="module")
def images(place):
    for name, size in COCO_IMAGES.items():
        path = place / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    return place / "images"


@fuzzing
@given(content=coco_files, way=st.sampled_from(["error", "skip", "skip"]), labelled=st.integers(0, 4).map(bool))
def test_any_coco_file_is_read_or_refused(place, images, content, way, labelled):
    path = place / "coco.json"
    path.write_bytes(content)
    dataset = read(place, COCODetection, str(place), path.name, images.name, None, way, labelled)
    for index in range(len(dataset) if dataset else 0):
        name = os.path.relpath(dataset.source(index), images)
        sample = read(place, dataset.__getitem__, index)
        if sample and labelled:
            boxes, size = sample[1]["boxes"], torch.tensor(COCO_IMAGES[name])
            assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= size).all()
            assert all(0 <= label < len(dataset.classes) for label in sample[1]["labels"].tolist())


def saved_files(folder):
    level = {"backbone": {"weight": torch.zeros(2, 3)}, "head": {"bias": torch.zeros(4)}}
    state = {"step": 3, "levels": {"level": level, 1: (0.9, None)}, "random": [torch.zeros(4)]}
    path = Checkpointer(folder).save("bissl", 3, 10, "resnet18", state, {"test/AP50": 0.5})
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved_files(tmp_path_factory.mktemp("checkpoint"))


@fuzzing
@given(data=st.data(), which=st.sampled_from(["manifest.json", "state.pt"]), vouched=st.booleans())
def test_any_checkpoint_is_read_or_refused_and_the_next_one_is_taken(place, checkpoint, data, which, vouched):
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    files = dict(checkpoint)
    manifest = json.loads(files["manifest.json"])
    if which == "manifest.json":
        moved = {**manifest, "files": {data.draw(st.sampled_from(NAMES)): manifest["files"]["state.pt"]}}
        files[which] = data.draw(json_files(manifest) | json_files(moved))
    else:
        files[which] = data.draw(damaged([files[which]]))
    if vouched and which != "manifest.json":
        described = {"size": len(files[which]), "sha256": hashlib.sha256(files[which]).hexdigest()}
        files["manifest.json"] = as_json(manifest | {"files": manifest["files"] | {which: described}})
    for step, content in ((1, checkpoint), (3, files)):
        path = folder / "bissl" / f"step_{step:06d}"
        path.mkdir(parents=True)
        for name, data_of in content.items():
            (path / name).write_bytes(data_of)
    loaded = read(place, load_checkpoint, path)
    assert loaded is None or isinstance(loaded[1], dict)
    newest, damaged_ones = read(place, Checkpointer(folder).newest_intact, "bissl")
    assert newest == path or (newest.name == "step_000001" and len(damaged_ones) == 1)


SHA256 = "0" * 64
RECORD = {
    "architecture": "test_resnet",
    "pretext": "simclr",
    "metrics": {"AP": {"mean": 0.5, "std": None, "values": [0.5]}},
    "files": {"model.safetensors": {"sha256": SHA256, "size": 3}},
}
INDEX = {"format": 1, "entries": {"tiny": RECORD, "tiny@2": RECORD}, "removed": ["gone"]}


@pytest.fixture(scope="module")
def zoo(place):
    publish_tiny(place / "zoo", config="train: {seed: 0}\n", pretext_head={"weight": torch.zeros(2)}, pretext="simclr")
    return place / "zoo"


@fuzzing
@given(
    data=st.data(), file=st.sampled_from(["entry.json", "config.json", "train_config.yaml", "pretext_head.safetensors"])
)
def test_any_file_of_an_entry_is_read_or_refused(place, zoo, data, file):
    path = zoo / "tiny" / file
    original, index = path.read_bytes(), (zoo / "index.json").read_bytes()
    if file.endswith(".json"):
        content = data.draw(json_files(json.loads(original)))
    else:
        content = data.draw(safetensors_files(original) if file.endswith(".safetensors") else yaml_files)
    record = json.loads(index)
    record["entries"]["tiny"]["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    try:
        path.write_bytes(content)
        (zoo / "index.json").write_text(json.dumps(record))
        entry = Zoo(zoo).find("tiny")
        for use in (entry.metadata, entry.parents):
            read(place, use)
        read(place, get_config, "tiny", zoo)
        read(place, lambda: read_entry("tiny", zoo=zoo))
        read(place, load_entry_weights, "tiny", "pretext_head.safetensors", zoo)
    finally:
        path.write_bytes(original)
        (zoo / "index.json").write_bytes(index)


SERVED = ("index.json", "tiny/entry.json", "tiny/train_config.yaml", "tiny/pretext_head.safetensors")


@pytest.fixture(scope="module")
def server(zoo):
    with FaultyServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        server.files = {f"/{file.relative_to(zoo)}": file.read_bytes() for file in zoo.rglob("*") if file.is_file()}
        yield server


@fuzzing
@given(data=st.data(), file=st.sampled_from(SERVED), lied=st.booleans())
def test_any_web_server_is_a_zoo_or_is_refused(place, zoo, server, data, file, lied):
    content = (zoo / file).read_bytes()
    if file == "index.json" and lied:
        content = data.draw(json_files(json.loads(content)))
    answer = Answer(raw=data.draw(http_answers(content)))
    server.requests.clear()
    server.plans = {f"/{file}": [answer] * 300}
    cache, before = place / "cache", set(os.listdir(place))
    shutil.rmtree(cache, ignore_errors=True)
    remote = Zoo(server.address, cache=Cache(cache, sleep=lambda seconds: None))
    for use in (
        lambda: list_backbones(zoo=remote),
        lambda: remote.find("tiny").metadata(),
        lambda: get_config("tiny", remote),
        lambda: read_entry("tiny", zoo=remote),
        lambda: load_entry_weights("tiny", "pretext_head.safetensors", remote),
    ):
        read(place, use, port=server.server_port)
    assert set(os.listdir(place)) <= before | {"cache"}
    assert not cache.exists() or set(os.listdir(cache)) <= {"blobs", "partial", "locks", "indexes"}
    for blob in cache.glob("blobs/*/*"):
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


METADATA = {"architecture": "test_resnet", "model_args": {"in_chans": 3}, "pixels": {"mean": [0.5], "std": [0.5]}}
LINES = [{"stage": "pretrain", "step": 1, "loss": 0.5}, {"stage": "bissl", "step": 1}, {"stage": "bissl", "step": 2}]
RUN_METADATA = {"datasets": {"train": {"name": "a", "samples": 3}}, "ancestors": [], "wall_time_s": 1.5}
RECEIPT = {"name": "tiny", "location": "/zoo/tiny", "sha256": SHA256}


def use_annotation(path):
    annotation = read_annotation(path)
    assert annotation.width >= 1 and annotation.height >= 1
    assert len(annotation.names) == len(annotation.boxes) == len(annotation.difficult)


def use_image(path):
    content = path.read_bytes()
    try:
        assert load_image(path, True).mode == load_image(path, False).mode == "RGB"
    except BisslZooError:
        assert content not in readable_images
        raise


def use_index(path):
    index = parse_index(path.read_bytes(), "fuzz")
    assert all(is_name(name) and all(map(is_name, record["files"])) for name, record in index.records.items())
    assert parse_index(index.to_bytes(), "again") == index


def use_name(path):
    name = path.read_bytes().decode("utf-8", "replace")
    if is_name(name):
        assert (path.parent / name).resolve().parent == path.parent.resolve() and split_version(name)[1] >= 1
    check_name(name)


def use_weights(path):
    backbone = read_weights(path)
    assert isinstance(backbone.architecture, str) and isinstance(backbone.model_args, dict)


def use_config(path):
    cfg = LazyConfig.load(path)
    LazyConfig.to_py(cfg)
    LazyConfig.save(cfg, path.parent / "again.yaml")


def use_overrides(path):
    cfg = OmegaConf.create(CONFIG)
    try:
        LazyConfig.apply_overrides(cfg, path.read_bytes().decode("utf-8", "surrogatepass").split("\0"))
    finally:
        assert cfg == CONFIG


def use_metrics(path):
    content = path.read_bytes()
    drop_lines_after(path, "bissl", 1)
    rest = path.read_bytes()
    assert content.startswith(rest) or content.decode("utf-8", "replace").startswith(rest.decode())


def use_run_metadata(path):
    read_metadata(path.parent)
    add_wall_time(path.parent, 1.0)


def use_receipt(path):
    entry = published(path.parent)
    assert entry is None or all(isinstance(value, str) for value in (entry.name, entry.location, entry.sha256))


def in_weights(metadata):
    return safetensors.torch.save({"weight": torch.zeros(2, 2)}, {"bissl_zoo": metadata.decode("utf-8", "replace")})


#: file name -> its contents, and how it is used
READERS = {
    "annotation.xml": (annotation_files, use_annotation),
    "image.jpg": (image_files, use_image),
    "index.json": (json_files(INDEX), use_index),
    "name": (st.sampled_from(NAMES).map(encoded) | damaged([b"tiny@2", b"a.b_c-d"]), use_name),
    "backbone.safetensors": (
        json_files(METADATA).map(in_weights) | safetensors_files(in_weights(b"{}")),
        use_weights,
    ),
    "config.yaml": (yaml_files, use_config),
    "overrides": (st.lists(overrides, max_size=3).map("\0".join).map(encoded), use_overrides),
    "metrics.jsonl": (
        st.lists(json_files(LINES[0]) | st.sampled_from(list(map(as_json, LINES))), max_size=5).map(b"\n".join),
        use_metrics,
    ),
    "metadata.json": (json_files(RUN_METADATA), use_run_metadata),
    "zoo_entry.json": (json_files(RECEIPT), use_receipt),
}


@pytest.mark.parametrize("name", READERS)
@fuzzing
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_file_is_read_or_refused(place, name, data):
    contents, use = READERS[name]
    (place / name).write_bytes(data.draw(contents))
    read(place, use, place / name, longest=200_000 if name == "overrides" else 20_000)  # they are repeated in it
