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

TARGETS = 13
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


def read(place, call, *arguments, longest=20_000, port=None):
    """Return what a call returns, or None if it raises a BisslZooError with a short message."""
    with watched(place, port):
        try:
            return call(*arguments)
        except BisslZooError as error:
            assert 0 < len(str(error)) < longest
            return None


@fuzzing
@given(content=annotation_files)
def test_any_annotation_is_read_or_refused(place, content):
    path = place / "a.xml"
    path.write_bytes(content)
    annotation = read(place, read_annotation, path)
    if annotation:
        assert annotation.width >= 1 and annotation.height >= 1
        assert len(annotation.names) == len(annotation.boxes) == len(annotation.difficult)


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


@fuzzing
@given(content=image_files, upright=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_any_image_is_read_or_refused(place, content, upright):
    path = place / "a.jpg"
    path.write_bytes(content)
    image = read(place, load_image, path, upright)
    assert image.mode == "RGB" if image else content not in readable_images


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


@fuzzing
@given(content=json_files(INDEX))
def test_any_index_is_read_or_refused(place, content):
    index = read(place, parse_index, content, "fuzz")
    if index:
        assert all(is_name(name) and all(map(is_name, record["files"])) for name, record in index.records.items())
        assert read(place, parse_index, index.to_bytes(), "again") == index


@fuzzing
@given(
    name=st.sampled_from(NAMES)
    | st.text(max_size=20)
    | damaged([b"tiny@2", b"a.b_c-d"]).map(lambda content: content.decode("utf-8", "replace"))
)
def test_any_name_stays_in_its_folder_or_is_refused(place, name):
    read(place, check_name, name)
    if is_name(name):
        assert (place / name).resolve().parent == place.resolve()
        assert split_version(name)[1] >= 1


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


@fuzzing
@given(data=st.data())
def test_any_backbone_file_is_read_or_refused(place, data):
    metadata = data.draw(json_files(METADATA)).decode("utf-8", "replace")
    content = safetensors.torch.save({"weight": torch.zeros(2, 2)}, {"bissl_zoo": metadata})
    if data.draw(st.booleans()):
        content = data.draw(safetensors_files(safetensors.torch.save({"weight": torch.zeros(2)}, {"bissl_zoo": "{}"})))
    path = place / "backbone.safetensors"
    path.write_bytes(content)
    backbone = read(place, read_weights, path)
    if backbone:
        assert isinstance(backbone.architecture, str) and isinstance(backbone.model_args, dict)


@fuzzing
@given(content=yaml_files)
def test_any_saved_config_is_read_or_refused(place, content):
    path = place / "config.yaml"
    path.write_bytes(content)
    cfg = read(place, LazyConfig.load, path)
    if cfg is not None:
        read(place, LazyConfig.save, cfg, place / "again.yaml")
        read(place, LazyConfig.to_py, cfg)


@fuzzing
@given(several=st.lists(overrides, max_size=3))
def test_any_override_is_applied_or_refused(place, several):
    cfg = OmegaConf.create(CONFIG)
    changed_cfg = read(place, LazyConfig.apply_overrides, cfg, several, longest=200_000)  # they are repeated in it
    assert cfg == CONFIG
    if changed_cfg is not None:
        read(place, LazyConfig.save, changed_cfg, place / "again.yaml")


LINES = [{"stage": "pretrain", "step": 1, "loss": 0.5}, {"stage": "bissl", "step": 1}, {"stage": "bissl", "step": 2}]


@fuzzing
@given(content=st.lists(json_files(LINES[0]) | st.sampled_from(list(map(as_json, LINES))), max_size=5).map(b"\n".join))
def test_of_any_metrics_a_first_part_stays(place, content):
    path = place / "metrics.jsonl"
    path.write_bytes(content)
    read(place, drop_lines_after, path, "bissl", 1)
    rest = path.read_bytes()
    assert content.startswith(rest) or content.decode("utf-8", "replace").startswith(rest.decode())


RUN_METADATA = {
    "datasets": {"train": {"name": "a", "samples": 3}},
    "ancestors": [],
    "hardware": "CPU",
    "wall_time_s": 1.5,
}
RECEIPT = {"name": "tiny", "location": "/zoo/tiny", "sha256": SHA256}


@fuzzing
@given(metadata=json_files(RUN_METADATA), receipt=json_files(RECEIPT))
def test_any_metadata_of_a_run_is_read_or_refused(place, metadata, receipt):
    (place / "metadata.json").write_bytes(metadata)
    (place / "zoo_entry.json").write_bytes(receipt)
    entry = read(place, published, place)
    assert entry is None or all(isinstance(value, str) for value in (entry.name, entry.location, entry.sha256))
    if read(place, read_metadata, place) is not None:
        read(place, add_wall_time, place, 1.0)
