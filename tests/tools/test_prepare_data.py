import contextlib
import hashlib
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from command_line import load_tool
from faulty_server import FaultyServer
from original_layouts import WRITERS, sizes_of
from PIL import Image

from bissl_zoo.data import ShardDataset
from bissl_zoo.data.datasets.classification import CLASSIFICATION_SETS


@pytest.fixture(scope="module")
def tool():
    return load_tool("prepare_data")


@pytest.fixture
def prepare(tool):
    """Call the command line: `prepare("--check", folder)` -> exit status, what it printed."""

    def call(*arguments):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = tool.cli([*map(str, arguments), "--num-workers", "0"])
        assert "Traceback" not in out.getvalue()
        return status, out.getvalue()

    return call


@pytest.fixture
def images(tmp_path):
    """Twelve JPEGs and a PNG at several depths, some of the same name, some with dots."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    names = [f"class.{n % 3}/photo.{n // 3}.JPEG" for n in range(9)]
    for name in [*names, "a/b.jpg", "a_b.jpg", "a-b.jpg", "top.png", "very/" + "long" * 40 + ".jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    (folder / "labels.txt").write_text("no image")
    return folder


def members(folder):
    """(shard, member name, bytes) of everything in the shards of a folder, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(path.name, member.name, tar.extractfile(member).read()) for member in tar]
    return found


def content_of(folder):
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


def test_a_folder_becomes_shards_that_hold_its_files_as_they_are(prepare, images, tmp_path):
    folder = tmp_path / "out"
    status, out = prepare("--to-shards", images, "--out", folder, "--samples-per-shard", 5, "--name", "few")
    assert status == 0 and "3 shards, 14 images" in out and "0 images that cannot be decoded" in out
    packed = members(folder)
    assert [shard for shard, _, _ in packed] == ["few-000000.tar"] * 5 + ["few-000001.tar"] * 5 + ["few-000002.tar"] * 4
    assert sorted(content for _, _, content in packed) == content_of(images)
    keys = [name.rpartition(".")[0] for _, name, _ in packed]
    assert len(set(keys)) == 14 and not any("." in key or "/" in key for key in keys)
    assert {name.rpartition(".")[2] for _, name, _ in packed} == {"jpg", "jpeg", "png"}
    assert max(len(name) for _, name, _ in packed) < 100
    listed = json.loads((folder / "index.json").read_text())["shards"]
    assert [entry["samples"] for entry in listed] == [5, 5, 4]
    for entry in listed:
        content = (folder / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert len(ShardDataset(str(folder))) == 14 and sorted(os.listdir(folder)) == [
        *(f"few-00000{n}.tar" for n in range(3)),
        "index.json",
    ]


def test_the_seed_decides_the_order_and_the_bytes(prepare, images, tmp_path):
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        assert prepare("--to-shards", images, "--out", tmp_path / name, "--name", "s", "--seed", seed)[0] == 0
    one, again, other = (members(tmp_path / name) for name in ("one", "again", "other"))
    assert (tmp_path / "one" / "s-000000.tar").read_bytes() == (tmp_path / "again" / "s-000000.tar").read_bytes()
    assert one == again != other
    order = [re.sub("^[0-9]+_", "", name) for _, name, _ in one]
    assert order != sorted(order)


def test_images_that_do_not_decode_are_refused_or_left_out_and_counted(prepare, images, tmp_path):
    (images / "class.0" / "broken.jpg").write_bytes(content_of(images)[0][:200])
    (images / "empty.png").write_bytes(b"")
    status, out = prepare("--to-shards", images, "--out", tmp_path / "out", "--samples-per-shard", 1)
    assert status == 1 and "does not decode" in out and "--on-bad skip" in out
    assert not (tmp_path / "out" / "index.json").exists()
    for path in (tmp_path / "out").glob("*.tar"):  # the shards before it are complete
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 1
    status, out = prepare("--to-shards", images, "--out", tmp_path / "skipped", "--on-bad", "skip")
    assert status == 0 and "14 images," in out and "2 images that cannot be decoded" in out
    assert f"{images}/empty.png" in out and f"{images}/class.0/broken.jpg" in out


def test_invalid_packing_is_refused(prepare, images, tmp_path):
    assert "is not empty" in prepare("--to-shards", images, "--out", images)[1]
    assert "no folder" in prepare("--to-shards", tmp_path / "nowhere", "--out", tmp_path / "out")[1]
    assert "letters, digits" in prepare("--to-shards", images, "--out", tmp_path / "out", "--name", "a.b")[1]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"x")
    status, out = prepare("--to-shards", tmp_path / "broken", "--out", tmp_path / "none", "--on-bad", "skip")
    assert status == 1 and "None of the 1 images" in out


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--to-shards", "x"], ["--check", "x", "--to-shards", "y"], ["--check", "x", "--samples-per-shard", "0"]),
        *(["food101", "--list"], ["food101", "--check", "x"], ["food101", "dtd"]),
    ],
)
def test_an_invalid_command_line_is_refused(tool, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.cli(arguments)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.fixture
def packed(prepare, images, tmp_path):
    """A folder of three shards."""
    assert prepare("--to-shards", images, "--out", tmp_path / "packed", "--name", "s", "--samples-per-shard", 5)[0] == 0
    return tmp_path / "packed"


def test_the_check_finds_every_problem(prepare, packed):
    status, out = prepare("--check", packed)
    assert status == 0 and f"\nchecked    {packed}: 3 shards, 14 images: 0 problems" in out and "split" not in out
    path = packed / "s-000001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[2]
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + 20] = b"x" * 20
    path.write_bytes(content)
    (packed / "s-000002.tar").write_bytes((packed / "s-000002.tar").read_bytes()[:3000])
    (packed / "s-000007.tar").write_bytes(b"")
    status, out = prepare("--check", packed)
    wrong = [line for line in out.splitlines() if line.startswith("wrong")]
    assert status == 1 and len(wrong) == 4 and "4 problems" in out
    for expected in (
        "s-000007.tar is not in index.json",
        "s-000001.tar: sha256",
        f"'{member.name}' in shard",
        "s-000002.tar cannot be read (ReadError: unexpected end of data",
    ):
        assert sum(expected in line for line in wrong) == 1, expected
    (packed / "s-000000.tar").unlink()
    assert "s-000000.tar does not exist" in prepare("--check", packed)[1]
    (packed / "index.json").unlink()
    assert "index.json does not exist" in prepare("--check", packed)[1]


@pytest.mark.slow
def test_shards_from_elsewhere_get_the_index_that_packing_wrote(prepare, packed, tmp_path):
    index = (packed / "index.json").read_bytes()
    (packed / "index.json").unlink()
    assert prepare("--index-shards", packed)[0] == 0
    assert (packed / "index.json").read_bytes() == index
    with FaultyServer() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in packed.glob("*.tar")}
        urls = f"{server.address}/s-{{000000..000002}}.tar"
        assert "--out" in prepare("--index-shards", urls)[1]
        assert prepare("--index-shards", urls, "--out", tmp_path / "index")[0] == 0
        assert (tmp_path / "index" / "index.json").read_bytes() == index
        assert len(ShardDataset(urls, index=str(tmp_path / "index" / "index.json"))) == 14
        server.files["/s-000001.tar"] = server.files["/s-000001.tar"][:4000]
        status, out = prepare("--index-shards", urls, "--out", tmp_path / "other")
        assert status == 1 and f"{server.address}/s-000001.tar cannot be read" in out
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_workers_change_nothing_but_the_time(prepare, tool, packed, images, tmp_path, capsys):
    command = ["--to-shards", images, "--out", tmp_path / "two", "--name", "s", "--samples-per-shard", 5]
    assert tool.cli([*map(str, command), "--num-workers", "2"]) == 0
    assert "14/14" in capsys.readouterr().err
    assert members(tmp_path / "two") == members(packed)
    assert tool.cli(["--check", str(packed), "--num-workers", "2"]) == 0


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """A folder of data sets with a small DTD, which counts as the original."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", "nowhere")  # restored afterwards, also after --root
    dtd = CLASSIFICATION_SETS["dtd"]._replace(images=sizes_of("dtd"), classes=3)
    monkeypatch.setitem(CLASSIFICATION_SETS, "dtd", dtd)
    WRITERS["dtd"](tmp_path / "originals")
    return tmp_path / "originals"


def test_a_set_by_name_is_counted_and_checked(prepare, originals):
    status, out = prepare("dtd", "--root", originals)
    assert status == 0 and f"checked    {originals}/dtd/dtd: 0 problems" in out and "fetched" not in out
    rows = [line.split() for line in out.splitlines()]
    assert [["train", "18", "3"], ["val", "12", "3"], ["trainval", "30", "3"], ["test", "15", "3"]] == rows[2:6]
    status, out = prepare("--check", "dtd", "--root", originals)
    assert status == 0 and "0 problems" in out and "30/30" in out and "15/15" in out
    victim = originals / "dtd" / "dtd" / "images" / "moa" / "moa_0000.jpg"
    victim.write_bytes(b"")
    status, out = prepare("--check", "dtd", "--root", originals)
    assert status == 1 and out.count("wrong ") == 1 and f"wrong      Image {victim} does not decode" in out
    victim.unlink()
    status, out = prepare("dtd", "--root", originals)
    assert status == 1 and f"The image {victim}" in out and "does not exist" in out


def test_the_list_shows_every_set_and_where_it_lies(prepare, originals):
    status, out = prepare("--list", "--root", originals)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and rows.keys() >= {*CLASSIFICATION_SETS, "voc_detection", "coco_detection"}
    assert "trainval 30, test 15" in rows["dtd"] and rows["dtd"].rstrip().endswith(f"{originals}/dtd/dtd")
    assert sum(line.endswith("not there") for line in rows.values()) == len(CLASSIFICATION_SETS) + 1


def test_a_name_wins_over_a_folder_of_the_same_name_and_a_path_does_not(prepare, packed, originals, monkeypatch):
    monkeypatch.chdir(packed.parent)
    packed.rename("dtd")
    status, out = prepare("--check", "dtd", "--root", originals)
    assert status == 0 and "trainval" in out
    for path in ("./dtd", packed.parent / "dtd"):
        status, out = prepare("--check", path)
        assert status == 0 and "3 shards" in out


def test_data_at_a_path_is_counted_and_every_file_is_opened(prepare, tmp_path):
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "mine" / name)
    status, out = prepare("--check", tmp_path / "mine")
    assert status == 0 and ["images", "3", "2"] in [line.split() for line in out.splitlines()]
    assert f'note       images is read by L(build_dataset)(name="image_folder", root="{tmp_path}/mine")' in out
    assert out.endswith(f"checked    {tmp_path}/mine: 0 problems\n")
    (tmp_path / "mine" / "dog" / "1.jpg").write_bytes(b"")
    status, out = prepare("--check", tmp_path / "mine")
    assert status == 1 and "wrong      Image" in out and "dog/1.jpg does not decode" in out
