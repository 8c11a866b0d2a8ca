import io
import json
import re
import tarfile
from itertools import islice

import numpy as np
import pytest
from faulty_server import Answer, FaultyServer
from PIL import Image

from bissl_zoo.data import ShardDataset, loaders
from bissl_zoo.data import shards as shards_module
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.data.prepare.pack import scan_shard, write_index
from bissl_zoo.data.shards import buffered_order, expand, find_shards
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.registry import build_dataset

WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]
SIZES = [9, 5, 12, 7, 11, 4]  # of the shards; 48 in all
#: the first batches of six with seed 7, recorded from the first version of the stream
GOLDEN = [[18, 14, 17, 19, 22, 46], [24, 0, 20, 47, 44, 25], [5, 2, 45, 6, 21, 34], [4, 36, 8, 16, 38, 3]]


def jpeg(number):
    """Return a JPEG from which `number_of` reads `number`, which is below 64."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (4 * number,) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def number_of(image, target=None):
    assert (image.mode, target) == ("RGB", None)
    return round(image.getpixel((3, 3))[0] / 4)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Six shards of 48 images with captions between them, not to be changed."""
    folder, number = tmp_path_factory.mktemp("shards"), 0
    for shard, size in enumerate(SIZES):
        members = []
        for _ in range(size):
            members += [(f"{number:04d}.txt", b"a caption"), (f"{number:04d}.jpg", jpeg(number))]
            number += 1
        write_tar(folder / f"s-{shard:06d}.tar", members)
    write_index(folder, [scan_shard(str(path)) for path in folder.glob("*.tar")])
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the shards that a test may damage."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(loaders, "get_rank", lambda: rank)
    monkeypatch.setattr(loaders, "get_world_size", lambda: world)


def stream(dataset, steps, batch_size=4, num_workers=0, start_step=0, seed=0):
    """The numbers of `steps` batches, a list each."""
    loader = build_train_loader(
        dataset, batch_size, number_of, num_workers=num_workers, start_step=start_step, seed=seed
    )
    return [batch.tolist() for batch in islice(loader, steps)]


def flat(batches):
    return [number for batch in batches for number in batch]


def shards(place, **options):
    return ShardDataset(str(place), shuffle_buffer=options.pop("shuffle_buffer", 10), **options)


@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_each_epoch_holds_every_sample_once_in_another_order(original, buffer):
    numbers = flat(stream(shards(original, shuffle_buffer=buffer), 36))
    epochs = [numbers[start : start + 48] for start in (0, 48, 96)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("world", "workers"),
    [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (3, 1)))],
)
def test_ranks_and_workers_share_each_epoch_without_overlap(original, monkeypatch, world, workers):
    per_rank = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        per_rank.append(flat(stream(shards(original), 48 // 4 * 2 // world, 4 * world, workers)))
    share = 48 // world
    for epoch in range(2):
        assert sorted(n for numbers in per_rank for n in numbers[epoch * share :][:share]) == list(range(48))


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_stream_from_a_step_is_the_rest_of_the_whole_one(original, monkeypatch, workers, world, rank):
    as_rank(monkeypatch, rank, world)
    # batches of 5 do not divide the epoch, so several hold samples of two
    dataset = shards(original)
    whole = stream(dataset, 30, 5 * world, workers)
    for start in (1, 10, 17):
        assert stream(dataset, 30 - start, 5 * world, workers, start) == whole[start:]


def test_the_stream_is_the_one_of_earlier_versions(original):
    assert stream(shards(original), 4, 6, seed=7) == GOLDEN


def test_the_buffer_shuffles_within_its_reach():
    order = buffered_order(5000, 100, np.random.default_rng(0))
    assert sorted(order) == list(range(5000))
    early = order - np.arange(5000)
    assert early.max() == 99 and early.min() < -300
    assert buffered_order(20, 1, np.random.default_rng(0)).tolist() == list(range(20))
    # a buffer that holds all is a plain permutation: each sample comes first equally often
    first = [buffered_order(4, 9, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert np.bincount(first, minlength=4).min() > 440  # 500 expected, standard deviation 19


def test_resuming_reads_only_the_remaining_shards(folder):
    dataset = shards(folder, shuffle_buffer=1, on_bad="error")
    whole = stream(dataset, 12)
    gone = next(
        k for k, size in enumerate(SIZES) if set(range(sum(SIZES[:k]), sum(SIZES[: k + 1]))) <= set(flat(whole[:6]))
    )
    (folder / f"s-{gone:06d}.tar").unlink()
    assert stream(dataset, 6, start_step=6) == whole[6:]
    with pytest.raises(DatasetError, match="does not exist"):
        stream(dataset, 12)


def test_fewer_shards_than_readers_are_refused_with_the_numbers(original, monkeypatch):
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(
        ConfigError, match=r"6 shards cannot feed 8 readers \(2 ranks with 4 workers each\).*num_workers"
    ):
        stream(shards(original), 1, 2, num_workers=4)


def damaged(folder, shard=2, sample=3):
    """Make one member of a shard no image, in place, and return its number."""
    path, number = folder / f"s-{shard:06d}.tar", sum(SIZES[:shard]) + sample
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{number:04d}.jpg")
    content = bytearray(path.read_bytes())
    content[member.offset_data : member.offset_data + member.size] = b"x" * member.size
    path.write_bytes(content)
    return number


@pytest.mark.parametrize("workers", WORKERS)
def test_skipping_replaces_an_image_and_moves_no_other(original, folder, workers):
    broken = {damaged(folder, 2, 3), damaged(folder, 4, 0), damaged(folder, 4, 1)}
    good, dataset = stream(shards(original), 26, 4, workers), shards(folder, on_bad="skip")
    filled = stream(dataset, 26, 4, workers)
    for before, after in zip(flat(good), flat(filled), strict=True):
        assert after == before if before not in broken else after not in broken
    for start in (5, 13):
        assert stream(dataset, 26 - start, 4, workers, start) == filled[start:]


@pytest.mark.parametrize("how", ["missing", "truncated", "cut between members", "no tar"])
def test_a_missing_or_damaged_shard_ends_the_run_with_its_name(folder, how):
    path = folder / "s-000002.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmember("0017.jpg").offset
    if how == "missing":
        path.unlink()
    else:
        kept = {"truncated": content[: header + 700], "cut between members": content[:header], "no tar": b"x" * 2000}
        path.write_bytes(kept[how])
    with pytest.raises(DatasetError, match=f"{path} (does not exist|cannot be read)"):
        stream(shards(folder), 12)


def test_a_shard_with_fewer_images_than_its_index_lists_ends_the_run(folder):
    write_tar(folder / "s-000002.tar", [("a.jpg", jpeg(1))])
    with pytest.raises(DatasetError, match="s-000002.tar holds 1 images, but its index lists 12"):
        stream(shards(folder), 12)
    with pytest.raises(DatasetError, match="holds 1 images"):
        shards(folder)[20]


def test_a_run_of_which_no_image_can_be_decoded_ends(folder):
    for shard, size in enumerate(SIZES):
        for sample in range(size):
            damaged(folder, shard, sample)
    with pytest.raises(DatasetError, match="1,000 images in a row cannot be decoded"):
        stream(shards(folder, on_bad="skip"), 1)


def test_an_index_reads_one_image_of_a_local_shard(original, folder):
    dataset = build_dataset(name="shards", urls=str(original))
    assert (len(dataset), dataset.classes) == (48, None)
    assert [number_of(*dataset[index]) for index in range(48)] == list(range(48))
    assert number_of(*dataset[-1]) == 47
    with pytest.raises(IndexError):
        dataset[48]
    assert flat(batch.tolist() for batch in build_test_loader(dataset, 7, number_of)) == list(range(48))
    number = damaged(folder)
    with pytest.raises(DatasetError, match=f"'{number:04d}.jpg' in shard"):
        shards(folder)[number]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/a-{8..11}.tar", ["http://h/a-8.tar", "http://h/a-9.tar", "http://h/a-10.tar", "http://h/a-11.tar"]),
        ("/x/{0..1}/b-{008..009}.tar", ["/x/0/b-008.tar", "/x/0/b-009.tar", "/x/1/b-008.tar", "/x/1/b-009.tar"]),
        (["/a.tar", "file:///b.tar", "c/d.tar"], ["/a.tar", "/b.tar", "root/c/d.tar"]),
    ],
)
def test_addresses_are_expanded(monkeypatch, url, expected):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", "root")
    assert expand(url) == expected


def test_an_invalid_address_is_refused(folder, tmp_path):
    for urls, message in {
        "/a-{1,2}.tar": "braces hold a range",
        "/a-{5..2}.tar": "runs backwards",
        "nope://host/a.tar": "nope://host/index.json cannot be read .*[pP]rotocol",
        str(tmp_path / "nowhere"): "index.json does not exist",
        f"{folder}/s-9.tar": "s-9.tar is not in .*index.json.*--index-shards",
    }.items():
        with pytest.raises(DatasetError, match=re.compile(message, re.DOTALL)):
            find_shards(urls)
    with pytest.raises(DatasetError, match="is given more than once"):
        find_shards([str(folder), f"{folder}/s-000001.tar"])


@pytest.mark.parametrize(
    "content",
    [
        *('{"shardlist": []}', "x", '{"format": 9}', "[1]"),
        json.dumps({"format": 1, "shards": [{"name": "../a.tar", "samples": 1, "bytes": 9, "sha256": None}]}),
        json.dumps({"format": 1, "shards": [{"name": "a.tar"}]}),
    ],
)
def test_an_invalid_index_is_refused(folder, content):
    (folder / "index.json").write_text(content)
    with pytest.raises(DatasetError, match="index.json is not an index of shards"):
        shards(folder)


def test_a_damaged_shard_is_not_indexed(folder):
    path = folder / "s-000002.tar"
    content = path.read_bytes()
    assert (scan_shard(str(path)).samples, scan_shard(str(path)).bytes) == (12, len(content))
    with tarfile.open(path) as tar:
        header = tar.getmember("0017.jpg").offset
    for damaged_content in (
        content[:header],
        content[: header + 700],
        content[:header] + b"x" * 512 + content[header + 512 :],
        b"",
    ):
        path.write_bytes(damaged_content)
        with pytest.raises(DatasetError, match=f"{path} cannot be read"):
            scan_shard(str(path))
    write_tar(path, [("a.txt", b"no image"), ("._a.jpg", b"left by a file manager")])
    with pytest.raises(DatasetError, match="holds no images"):
        scan_shard(str(path))


@pytest.fixture
def server(original, monkeypatch):
    """A web server that has the shards."""
    monkeypatch.setattr(shards_module, "PAUSE", 0.0)
    with FaultyServer() as server:
        server.files = {f"/set/{path.name}": path.read_bytes() for path in original.iterdir()}
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2])
def test_remote_shards_give_the_same_stream(original, server, workers):
    address = f"{server.address}/set"
    assert stream(shards(address), 14, 4, workers) == stream(shards(original), 14, 4, workers)
    pattern = f"{address}/s-{{000000..000005}}.tar"
    assert stream(shards(pattern), 5, 4, workers, 7) == stream(shards(original), 5, 4, workers, 7)
    assert sample_digest(shards(address)) == sample_digest(shards(original))
    with pytest.raises(DatasetError, match="only read as a stream"):
        shards(address)[0]


@pytest.mark.slow
def test_a_connection_that_breaks_is_retried_and_ranges_are_not_needed(original, server):
    dataset = shards(f"{server.address}/set")
    broken = [Answer(sends=5000, end="reset"), Answer(status=503), Answer(sends=9000)]
    plans = {path: list(broken) + [Answer(ranges=False)] * 20 for path in server.files if path.endswith(".tar")}
    server.plans = plans
    server.requests.clear()
    assert stream(dataset, 12) == stream(shards(original), 12)
    assert min(sum(r.path == path for r in server.requests) for path in server.plans) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kept", [None, 0.5])
def test_a_remote_shard_that_is_missing_or_short_is_named(server, kept):
    path = "/set/s-000002.tar"
    content = server.files.pop(path)
    if kept:
        server.files[path] = content[: int(len(content) * kept)]
    with pytest.raises(DatasetError, match=f"{server.address}{path} "):
        stream(shards(f"{server.address}/set"), 12)


def test_shards_of_the_webdataset_library_are_read_and_ours_by_it(tmp_path, original):
    webdataset = pytest.importorskip("webdataset", reason="compares with webdataset, which is not installed")
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:03d}", "jpg": jpeg(number), "json": {"label": number}})
    write_index(tmp_path, [scan_shard(str(path)) for path in tmp_path.glob("*.tar")])
    assert [number_of(*sample) for sample in shards(tmp_path)] == list(range(10))
    theirs = webdataset.WebDataset([str(path) for path in sorted(original.glob("*.tar"))], shardshuffle=False)
    assert [sample["jpg"] for sample in theirs] == [jpeg(number) for number in range(48)]
