import io
import json
import logging
import re
import tarfile
from itertools import islice

import numpy as np
import pytest
from faulty_server import Answer, FaultyServer
from PIL import Image

from bissl_zoo.config import LazyCall, instantiate
from bissl_zoo.data import ShardDataset, loaders, shards_reading
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.data.shards_index import digest_shard, expand, find_shards, scan_shard, write_index
from bissl_zoo.data.shards_reading import buffered_order
from bissl_zoo.errors import BisslZooError, ConfigError, DatasetError
from bissl_zoo.registry import build_dataset

SIZES = [9, 5, 12, 7, 11, 4]  # of the shards; 48 in all


def jpeg(number):
    """A JPEG that `number_of` tells from every other below 64."""
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
    write_index(folder, [digest_shard(str(path)) for path in folder.glob("*.tar")])
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


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (2, 2), (3, 1)])
def test_ranks_and_workers_share_each_epoch_without_overlap(original, monkeypatch, world, workers):
    per_rank = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        per_rank.append(flat(stream(shards(original), 48 // 4 * 2 // world, 4 * world, workers)))
    share = 48 // world
    for epoch in range(2):
        assert sorted(n for numbers in per_rank for n in numbers[epoch * share :][:share]) == list(range(48))


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_from_a_step_is_the_rest_of_the_whole_one(original, monkeypatch, workers, world, rank):
    as_rank(monkeypatch, rank, world)
    # batches of 5 do not divide the epoch, so several hold samples of two
    dataset = shards(original)
    whole = stream(dataset, 30, 5 * world, workers)
    for start in (1, 4, 9, 10, 17, 26):
        assert stream(dataset, 30 - start, 5 * world, workers, start) == whole[start:]


def test_the_seed_decides_the_order(original):
    one = stream(shards(original), 12)
    assert one == stream(shards(original), 12)
    assert one != stream(shards(original), 12, seed=1)


def test_consumers_draw_differently(original, monkeypatch):
    drawn = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        numbers = flat(stream(shards(original), 12, 4))
        pieces = shards_reading.epoch_share(np.array(SIZES), 0, 0, *shards_reading.epoch_bounds(48, 0, rank, 2))
        lying = [sum(SIZES[: piece.shard]) + n for piece in pieces for n in range(piece.start, piece.stop)]
        drawn.append([lying.index(number) for number in numbers])
    assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(24))
    assert drawn[0] != drawn[1]


def test_shares_of_an_epoch_that_does_not_divide_stay_level(original):
    sizes = np.array(SIZES)
    for consumer in range(5):
        taken = 0
        for epoch in range(1, 100):
            first, last = shards_reading.epoch_bounds(48, epoch - 1, consumer, 5)
            pieces = shards_reading.epoch_share(sizes, 0, epoch - 1, first, last)
            assert sum(piece.stop - piece.start for piece in pieces) == last - first
            taken += last - first
            assert abs(taken - epoch * 48 / 5) < 2


def test_the_buffer_shuffles_within_its_reach():
    order = buffered_order(5000, 100, np.random.default_rng(0))
    assert sorted(order) == list(range(5000))
    early = order - np.arange(5000)
    assert early.max() == 99 and early.min() < -300
    assert buffered_order(20, 1, np.random.default_rng(0)).tolist() == list(range(20))
    # a buffer that holds all is a plain permutation: each sample comes first equally often
    first = [buffered_order(4, 9, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert np.bincount(first, minlength=4).min() > 440  # 500 expected, standard deviation 19


def test_going_on_reads_only_the_shards_that_are_still_wanted(folder):
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


def test_a_member_that_does_not_decode_is_named(folder):
    number = damaged(folder)
    with pytest.raises(DatasetError) as caught:
        stream(shards(folder, on_bad="error"), 12)
    message = str(caught.value)
    assert f"'{number:04d}.jpg' in shard {folder}/s-000002.tar does not decode" in message
    assert re.search(r"\(UnidentifiedImageError: cannot identify image file of \d+ bytes\)", message)
    assert 'on_bad="skip"' in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_fills_the_place_of_a_broken_member_and_moves_no_other(original, folder, workers):
    broken = {damaged(folder, 2, 3), damaged(folder, 4, 0), damaged(folder, 4, 1)}
    good, dataset = stream(shards(original), 26, 4, workers), shards(folder, on_bad="skip")
    filled = stream(dataset, 26, 4, workers)
    for before, after in zip(flat(good), flat(filled), strict=True):
        assert after == before if before not in broken else after not in broken
    for start in (5, 13):
        assert stream(dataset, 26 - start, 4, workers, start) == filled[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_member_is_replaced_unless_asked_told_of_once_and_counted_over_all_workers(folder, workers, caplog):
    damaged(folder, 2, 3), damaged(folder, 4, 0)
    with caplog.at_level(logging.WARNING):
        stream(shards(folder), 60, num_workers=workers)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("does not decode" in line for line in told)
    assert "(1 bad so far)" in told[0] and "(2 bad so far)" in told[1]


def test_a_stream_begins_anew_with_what_it_met(folder):
    damaged(folder, 2, 3)
    dataset, found = shards(folder), []
    for _ in range(2):
        loader = build_train_loader(dataset, 4, number_of)
        list(islice(loader, 12))
        found.append(list(loader.skipped))
    assert found[0] == found[1] and len(found[0]) == 1 and "s-000002.tar" in found[0][0]


@pytest.mark.parametrize("how", ["missing", "truncated", "no tar"])
def test_a_broken_shard_is_named_or_others_stand_in(original, folder, how, caplog):
    path = folder / "s-000002.tar"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else b"x" * len(content))
    reason = {"missing": "does not exist", "truncated": "index says", "no tar": "cannot be read: ReadError"}[how]
    with pytest.raises(DatasetError, match=rf'Shard {path} .*{reason}.*on_bad="skip"'):
        stream(shards(folder, on_bad="error"), 12)
    dataset, lost = shards(folder, on_bad="skip"), range(14, 26)
    good, filled = flat(stream(shards(original), 24)), flat(stream(dataset, 24))
    stand_ins = [after for before, after in zip(good, filled, strict=True) if before in lost]
    assert [(b, a) for b, a in zip(good, filled, strict=True) if b not in lost and a != b] == []
    assert not set(stand_ins) & set(lost) and len(set(stand_ins)) > 6  # many samples, not one again and again
    assert sum(reason.removesuffix(": ReadError") in record.getMessage() for record in caplog.records) == 1
    for start in (3, 10, 15):
        assert flat(stream(dataset, 24 - start, start_step=start)) == filled[4 * start :]


def test_where_nothing_decodes_it_ends(folder, monkeypatch):
    for shard, size in enumerate(SIZES):
        for sample in range(size):
            damaged(folder, shard, sample)
    with pytest.raises(DatasetError, match="1,000 samples in a row do not decode"):
        stream(shards(folder, on_bad="skip"), 1)
    for file in folder.glob("*.tar"):
        file.unlink()
    with pytest.raises(DatasetError, match="No shard can stand in for"):
        stream(shards(folder, on_bad="skip"), 1)


def test_an_index_reads_one_sample(original, folder):
    dataset = build_dataset(name="shards", urls=str(original))
    assert (len(dataset), dataset.classes) == (48, None)
    assert [number_of(*dataset[index]) for index in range(48)] == list(range(48))
    assert number_of(*dataset[-1]) == 47
    with pytest.raises(IndexError):
        dataset[48]
    assert flat(batch.tolist() for batch in build_test_loader(dataset, 7, number_of)) == list(range(48))
    (folder / "s-000001.tar").unlink()
    number = damaged(folder)
    skipping = shards(folder, on_bad="skip")
    assert number_of(*skipping[number]) == number + 1
    assert number_of(*skipping[9]) == 14  # the first of the shard that follows
    with pytest.raises(DatasetError, match=f"'{number:04d}.jpg' in shard"):
        shards(folder, on_bad="error")[number]


def test_pictures_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("L", (40, 20)).save(file, "JPEG", exif=exif)
    write_tar(tmp_path / "a.tar", [("x.jpeg", file.getvalue())])
    image, target = shards(tmp_path)[0]
    assert (image.size, image.mode, target) == ((20, 40), "RGB", None)


def test_local_shards_are_counted_on_first_use_and_entered_in_the_index(folder):
    (folder / "index.json").unlink()
    first = shards(f"{folder}/s-{{000001..000002}}.tar")
    assert [shard.samples for shard in first.shards] == SIZES[1:3]
    assert [entry["name"] for entry in json.loads((folder / "index.json").read_text())["shards"]] == [
        "s-000001.tar",
        "s-000002.tar",
    ]
    assert [shard.samples for shard in shards(folder).shards] == SIZES
    listed = json.loads((folder / "index.json").read_text())["shards"]
    assert [entry["samples"] for entry in listed] == SIZES and listed[0]["sha256"] is None
    (folder / "s-000000.tar").touch()  # the index is believed, not made anew
    assert len(shards(folder)) == 48


def test_the_digest_tells_other_shards_from_the_same(original, folder):
    digest = sample_digest(shards(original))
    assert digest == sample_digest(shards(folder)) != sample_digest(shards(folder / "s-000001.tar"))
    number = damaged(folder)
    write_index(folder, [digest_shard(str(path)) for path in folder.glob("*.tar")])
    assert digest != sample_digest(shards(folder)), number


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


def test_braces_mean_what_they_mean_in_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="compares with webdataset, which is not installed")
    for pattern in ("/a-{000000..000012}.tar", "/{0..2}/b{08..11}.tar"):
        assert expand(pattern) == list(webdataset.shardlists.expand_urls(pattern))


def test_what_is_wrong_with_an_address_or_an_index_is_told(folder, tmp_path):
    for urls, message in {
        "/a-{1,2}.tar": "braces hold a range",
        "/a-{5..2}.tar": "runs backwards",
        "nope://host/a.tar": "'nope://' of 'nope://host/index.json' is not known",
        str(tmp_path / "nowhere"): "no folder of shards",
        str(tmp_path / "nowhere" / "a.tar"): "does not exist",
    }.items():
        with pytest.raises(BisslZooError, match=message):
            find_shards(urls)
    with pytest.raises(DatasetError, match="is named more than once"):
        find_shards([str(folder), f"{folder}/s-000001.tar"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no .tar files"):
        shards(tmp_path / "empty")
    with pytest.raises(DatasetError, match='on_bad is "ignore"'):
        shards(folder, on_bad="ignore")
    with pytest.raises(DatasetError, match="shuffle_buffer is 0"):
        shards(folder, shuffle_buffer=0)
    for content in (
        '{"shardlist": []}',
        "x",
        '{"format": 9}',
        json.dumps({"format": 1, "shards": [{"name": "../a.tar"}]}),
    ):
        (folder / "index.json").write_text(content)
        with pytest.raises(DatasetError, match="index.json is no index of shards"):
            shards(folder)
        assert (folder / "index.json").read_text() == content


@pytest.mark.parametrize("look", [scan_shard, digest_shard])
def test_a_damaged_shard_is_not_counted(folder, look):
    path = folder / "s-000002.tar"
    content = path.read_bytes()
    expected = scan_shard(str(path))
    assert expected.samples == 12 and look(str(path)).bytes == len(content)
    with tarfile.open(path) as tar:
        header = tar.getmember("0017.jpg").offset
    for broken in (
        content[:header],
        content[: header + 700],
        content[:header] + b"x" * 512 + content[header + 512 :],
        b"",
    ):
        path.write_bytes(broken)
        with pytest.raises(DatasetError, match=f"Shard {path} cannot be read"):
            look(str(path))
    write_tar(path, [("a.txt", b"no image"), ("._a.jpg", b"left by a file manager")])
    with pytest.raises(DatasetError, match="holds no images"):
        look(str(path))


@pytest.fixture
def server(original, monkeypatch):
    """A web server that has the shards."""
    monkeypatch.setattr(shards_reading, "PAUSE", 0.0)
    with FaultyServer() as server:
        server.files = {f"/set/{path.name}": path.read_bytes() for path in original.iterdir()}
        yield server


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_stream(original, server, workers):
    address = f"{server.address}/set"
    assert stream(shards(address), 14, 4, workers) == stream(shards(original), 14, 4, workers)
    pattern = f"{address}/s-{{000000..000005}}.tar"
    assert stream(shards(pattern), 5, 4, workers, 7) == stream(shards(original), 5, 4, workers, 7)
    assert number_of(*shards(address)[13]) == 13
    assert sample_digest(shards(address)) == sample_digest(shards(original))


def test_a_server_without_ranges_will_do(original, server):
    server.plans = {path: [Answer(ranges=False)] * 20 for path in server.files}
    assert stream(shards(f"{server.address}/set"), 12) == stream(shards(original), 12)


def test_a_connection_that_breaks_is_taken_up_again(original, server):
    dataset = shards(f"{server.address}/set")
    broken = [Answer(sends=5000, end="reset"), Answer(status=503), Answer(sends=9000), Answer(sends=0, end="reset")]
    server.plans = {path: list(broken) for path in server.files if path.endswith(".tar")}
    server.requests.clear()
    assert stream(dataset, 12) == stream(shards(original), 12)
    assert min(sum(r.path == path for r in server.requests) for path in server.plans) >= 3


def test_a_remote_shard_that_is_missing_or_short_is_named_or_replaced(original, server):
    path = f"/set/s-{2:06d}.tar"
    whole, good = server.files[path], flat(stream(shards(original), 24))
    for content in (None, whole[: len(whole) // 2]):
        server.files.pop(path)
        if content:
            server.files[path] = content
        with pytest.raises(DatasetError, match=f"Shard {server.address}{path} "):
            stream(shards(f"{server.address}/set", on_bad="error"), 12)
        dataset = shards(f"{server.address}/set", on_bad="skip")
        filled = flat(stream(dataset, 24))
        assert [a for b, a in zip(good, filled, strict=True) if b not in range(14, 26)] == [
            b for b in good if b not in range(14, 26)
        ]
        assert flat(stream(dataset, 9, start_step=15)) == filled[60:]
        server.files[path] = whole


def test_remote_shards_without_an_index_name_the_command(server, original):
    index = server.files.pop("/set/index.json")
    for urls in (f"{server.address}/set", f"{server.address}/set/s-000000.tar"):
        with pytest.raises(DatasetError, match="tools/prepare_data.py --index-shards"):
            shards(urls)
    assert index == (original / "index.json").read_bytes()
    elsewhere = shards(f"{server.address}/set/s-{{000000..000005}}.tar", index=str(original / "index.json"))
    assert len(elsewhere) == 48
    with pytest.raises(DatasetError, match="There is no index"):
        shards(f"{server.address}/set/s-000000.tar", index=str(original / "nothing.json"))
    with pytest.raises(DatasetError, match=r"s-9.tar: .*does not count its samples"):
        shards(f"{server.address}/set/s-9.tar", index=str(original / "index.json"))


def test_shards_of_the_webdataset_library_are_read_and_ours_by_it(tmp_path, original):
    webdataset = pytest.importorskip("webdataset", reason="compares with webdataset, which is not installed")
    with webdataset.ShardWriter(str(tmp_path / "w-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:03d}", "jpg": jpeg(number), "json": {"label": number}})
    assert [number_of(*sample) for sample in shards(tmp_path)] == list(range(10))
    theirs = webdataset.WebDataset([str(path) for path in sorted(original.glob("*.tar"))], shardshuffle=False)
    assert [sample["jpg"] for sample in theirs] == [jpeg(number) for number in range(48)]


def test_a_config_describes_it(original):
    call = LazyCall(build_train_loader)(
        dataset=LazyCall(build_dataset)(name="shards", urls=[str(original)], shuffle_buffer=5), batch_size=6
    )
    loader = instantiate(call, transform=number_of)
    assert next(iter(loader)).shape == (6,)
