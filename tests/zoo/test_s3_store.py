import inspect
import json
import os
import subprocess
import sys

import pytest
from scripted_s3 import use_server

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.s3 import S3Store
from bissl_zoo.zoo.stores.store import Conflict, Content

boto3 = pytest.importorskip("boto3", reason='S3 needs boto3: pip install "bissl_zoo[s3]"')
pytest.importorskip("moto", minversion="5.1.5", reason='the S3 server of these tests: pip install "moto[server]"')


#: one request at a time, since moto looks at a condition and writes in two steps
SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(server.port, flush=True)
server.serve_forever()
"""


def publish(who):
    """Add 20 records to an index, each by read and replace; how often somebody else was faster.

    Both publishers have read the index before one of them writes it, so that they meet at least once.
    """
    store, conflicts = S3Store("s3://zoo/race"), 0
    for number in range(20):
        while True:
            seen = store.read("index.json", 1 << 20)
            records = json.loads(seen.content) if seen else {}
            records[f"{who}-{number}"] = number
            if seen is None:
                store.create(f"met/{who}", b"")
                while store.read("met/this", 1) is None or store.read("met/other", 1) is None:
                    pass
            try:
                store.replace("index.json", json.dumps(records).encode(), seen.tag if seen else None)
                break
            except Conflict:
                conflicts += 1
    return conflicts


OTHER = f"""
import json
from bissl_zoo.zoo.stores.s3 import S3Store
from bissl_zoo.zoo.stores.store import Conflict
{inspect.getsource(publish)}
print(publish("other"))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an S3 server in a process of its own, with an empty bucket `zoo`."""
    log = open(tmp_path_factory.mktemp("moto") / "log", "wb")
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=log)
    try:
        address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with pytest.MonkeyPatch.context() as patch:
            use_server(patch, address)
            boto3.client("s3").create_bucket(Bucket="zoo")
        yield address
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        log.close()


@pytest.fixture
def aws(server, monkeypatch):
    use_server(monkeypatch, server)
    return boto3.client("s3")


@pytest.fixture
def store(aws, request):
    return S3Store(f"s3://zoo/{request.node.name}/")


def drain(store, path, offset=0):
    with store.open(path, offset) as body:
        return body.start, b"".join(body.blocks)


def test_what_is_created_can_be_read_whole_and_from_the_middle(store, tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "model").write_bytes(content)
    store.create("x@2/model.safetensors", tmp_path / "model")
    assert drain(store, "x@2/model.safetensors") == (0, content)
    assert drain(store, "x@2/model.safetensors", 2_000_001) == (2_000_001, content[2_000_001:])
    assert drain(store, "x@2/model.safetensors", len(content)) == (len(content), b"")


def test_a_missing_file_is_none_to_read_and_an_error_to_open(store):
    assert store.read("index.json", 10) is None
    with pytest.raises(ZooError, match=r"s3://zoo/.*/x/model.safetensors does not exist"):
        drain(store, "x/model.safetensors")


def test_a_file_above_the_limit_is_refused(store):
    store.create("x/entry.json", b"12345")
    assert store.read("x/entry.json", 5).content == b"12345"
    with pytest.raises(ZooError, match="has 5 bytes, more than the 4"):
        store.read("x/entry.json", 4)


def test_a_file_is_created_once(store, aws):
    store.create("x/.publishing", b"first")
    with pytest.raises(Conflict, match="x/.publishing"):
        store.create("x/.publishing", b"second")
    assert store.read("x/.publishing", 10).content == b"first"


def test_an_index_is_replaced_only_as_it_was_read(store):
    store.replace("index.json", b"1", None)
    with pytest.raises(Conflict):
        store.replace("index.json", b"other", None)
    seen = store.read("index.json", 10)
    assert isinstance(seen, Content) and seen.content == b"1"
    store.replace("index.json", b"2", seen.tag)
    with pytest.raises(Conflict, match="index.json"):
        store.replace("index.json", b"3", seen.tag)
    assert store.read("index.json", 10).content == b"2"


def test_an_index_removed_meanwhile_is_a_conflict(store):
    store.replace("index.json", b"1", None)
    tag = store.read("index.json", 10).tag
    store.remove("index.json")
    with pytest.raises(Conflict):
        store.replace("index.json", b"2", tag)
    assert store.read("index.json", 10) is None


def test_folders_are_listed_and_removed_with_what_is_in_them_alone(store, aws):
    for path in ("a/model", "a/entry.json", "a@2/model", "b/.publishing"):
        store.create(path, b"")
    store.replace("index.json", b"", None)
    assert store.folders() == ["a", "a@2", "b"]
    store.remove_folder("a")
    store.remove_folder("absent")
    assert store.folders() == ["a@2", "b"]
    store.remove("b/.publishing")
    store.remove("b/.publishing")
    assert store.folders() == ["a@2"]


def test_the_trial_of_conditions_leaves_nothing_behind(store, aws):
    store.create("x/model", b"")
    prefix = store.location.removeprefix("s3://zoo/")
    listed = aws.list_objects_v2(Bucket="zoo", Prefix=prefix)["Contents"]
    assert [item["Key"] for item in listed] == [f"{prefix}/x/model"]


def test_two_publishers_at_once_lose_no_record(aws):
    with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as other:
        conflicts = publish("this") + int(other.communicate(timeout=60)[0])
    records = json.loads(S3Store("s3://zoo/race").read("index.json", 1 << 20).content)
    assert records == {f"{who}-{number}": number for who in ("this", "other") for number in range(20)}
    assert conflicts > 0


def test_a_bucket_that_does_not_exist_is_told(aws):
    with pytest.raises(ZooError, match="s3://absent-bucket/index.json: there is no such bucket. Correct the name"):
        S3Store("s3://absent-bucket").read("index.json", 10)


@pytest.mark.parametrize("location", ["s3://", "s3:///folder", "s3://key:hidden@zoo/folder", "s3://zoo?x=1"])
def test_an_address_that_is_none_is_refused_without_its_secret(location):
    with pytest.raises(ZooError, match="s3://BUCKET/FOLDER") as caught:
        S3Store(location)
    assert "hidden" not in str(caught.value)


def test_a_file_above_what_s3_takes_at_once_is_refused(store, tmp_path):
    with open(tmp_path / "model", "wb") as sparse:
        sparse.truncate((5 << 30) + 1)
    with pytest.raises(ZooError, match="5,368,709,121 bytes.*5,368,709,120 at most"):
        store.create("x/model", tmp_path / "model")


def test_without_boto3_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("boto3", "botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ZooError, match=r'pip install "bissl_zoo\[s3\]"'):
        S3Store("s3://zoo")


def test_a_profile_that_does_not_exist_is_told(aws, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ZooError, match="nobody.*aws configure list"):
        S3Store("s3://zoo")
