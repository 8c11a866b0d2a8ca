import inspect
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_server import REPO, TOKEN, Hub, HubHandler
from tiny_entries import publish_tiny

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.huggingface import HubStore
from bissl_zoo.zoo.stores.store import Conflict, Transient


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # xet has a protocol of its own between its library and its servers
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    server = Hub()
    # what HF_ENDPOINT sets where it is there when huggingface_hub is imported, as in the other process below
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(hub):
    return HubStore(f"hf://{REPO}")


def drain(store, path, offset=0):
    with store.open(path, offset) as body:
        return body.start, b"".join(body.blocks)


def test_a_publication_is_one_commit_with_the_index(store, hub, tmp_path):
    weights = os.urandom(2 << 20)
    (tmp_path / "weights").write_bytes(weights)
    before = hub.files()
    store.create("x@2/.publishing", b"host, pid")
    store.create("x@2/entry.json", b"{}")
    store.create("x@2/model.safetensors", tmp_path / "weights")
    assert hub.files() == before
    store.replace("index.json", b"1", None)
    store.remove("x@2/.publishing")
    assert hub.messages == ["initial commit", "Publish x@2"]
    added = {"index.json": b"1", "x@2/entry.json": b"{}", "x@2/model.safetensors": weights}
    assert hub.files() == {**before, **added}


def test_files_are_read_whole_and_from_the_middle_and_the_token_stays_at_the_hub(store, hub):
    content = os.urandom(3 << 20)
    hub.commit({"x@2/model.safetensors": content, "x@2/entry.json": b"12345"}, "by hand")
    assert drain(store, "x@2/model.safetensors") == (0, content)
    assert drain(store, "x@2/model.safetensors", 2_000_001) == (2_000_001, content[2_000_001:])
    assert drain(store, "x@2/model.safetensors", len(content)) == (len(content), b"")
    assert drain(store, "x@2/entry.json", 2) == (2, b"345")
    sent = {path.split("/")[1]: headers.get("Authorization") for _, path, headers in hub.seen}
    assert sent == {"lab": f"Bearer {TOKEN}", "cdn": None}


def test_a_missing_file_is_none_to_read_and_an_error_to_open(store):
    assert store.read("index.json", 10) is None
    with pytest.raises(ZooError, match="hf://lab/zoo/x/model does not exist"):
        drain(store, "x/model")


def test_a_file_above_the_limit_is_refused(store, hub):
    hub.commit({"index.json": b"12345"}, "by hand")
    assert store.read("index.json", 5).content == b"12345"
    with pytest.raises(ZooError, match="more than the 4 bytes"):
        store.read("index.json", 4)


def test_an_index_is_replaced_only_as_it_was_read(store, hub):
    store.replace("index.json", b"1", None)
    with pytest.raises(Conflict):
        store.replace("index.json", b"other", None)
    seen = store.read("index.json", 10)
    assert (seen.content, seen.tag) == (b"1", hub.head)
    store.replace("index.json", b"2", seen.tag)
    with pytest.raises(Conflict, match="A commit has happened since"):
        store.replace("index.json", b"3", seen.tag)
    assert hub.files()["index.json"] == b"2"
    assert hub.messages[1:] == ["Update index.json"] * 2


def test_an_entry_survives_a_conflict_and_is_sent_with_the_next_attempt(store, hub):
    tag = hub.head
    store.create("x/entry.json", b"{}")
    hub.commit({**hub.files(), "index.json": b"theirs"}, "by hand")
    with pytest.raises(Conflict):
        store.replace("index.json", b"mine", tag)
    store.replace("index.json", b"both", store.read("index.json", 10).tag)
    assert hub.files()["index.json"] == b"both" and hub.files()["x/entry.json"] == b"{}"


def test_names_that_are_taken_cannot_be_created(store, hub):
    hub.commit({"x/model": b"there"}, "by hand")
    for path in ("x/.publishing", "x/model"):
        with pytest.raises(Conflict, match=f"{path.removesuffix('/.publishing')} exists already"):
            store.create(path, b"")
    store.create("y/.publishing", b"")
    with pytest.raises(Conflict):
        store.create("y/.publishing", b"")


def test_a_name_that_was_published_meanwhile_is_not_overwritten(store, hub):
    store.create("x/.publishing", b"")
    store.create("x/model", b"mine")
    hub.commit({**hub.files(), "x/model": b"theirs", "index.json": b"theirs"}, "by hand")
    with pytest.raises(ZooError, match="x/model was published by another process.*next version") as caught:
        store.replace("index.json", b"mine", hub.head)
    assert not isinstance(caught.value, Conflict)
    store.remove_folder("x")
    assert hub.files()["x/model"] == b"theirs", "only what was not sent is forgotten"
    store.replace("index.json", b"later", hub.head)
    assert hub.files() == {".gitattributes": b"", "x/model": b"theirs", "index.json": b"later"}


def test_folders_and_files_are_removed_by_commits(store, hub):
    hub.commit({"a/model": b"", "a@2/model": b"", "b/model": b"", ".git/x": b"", "index.json": b""}, "by hand")
    assert store.folders() == ["a", "a@2", "b"]
    store.remove_folder("a")
    store.remove_folder("absent")
    store.remove("b/model")
    store.remove("b/model")
    assert sorted(hub.files()) == [".git/x", "a@2/model", "index.json"]
    assert hub.messages[-2:] == ["Remove a", "Remove b/model"]


def test_a_revision_is_read_as_it_was(store, hub):
    hub.commit({"index.json": b"old"}, "by hand")
    old = hub.head
    hub.commit({"index.json": b"new"}, "by hand")
    assert HubStore(f"hf://{REPO}@{old}").read("index.json", 10).content == b"old"
    assert store.read("index.json", 10).content == b"new"
    with pytest.raises(ZooError, match="lab/zoo has no revision 'v7'"):
        HubStore(f"hf://{REPO}@v7").read("index.json", 10)


def publish(store, who, meet):
    """Publish 10 entries, each with its record in the index; how often somebody else was faster.

    Args:
        meet: waits for the other publisher, when both have read the same index.
    """
    conflicts = 0
    for number in range(10):
        store.create(f"{who}-{number}/entry.json", b"{}")
        while True:
            seen = store.read("index.json", 10_000)
            if number == conflicts == 0:
                meet()
            try:
                records = {**json.loads(seen.content), f"{who}-{number}": number}
                store.replace("index.json", json.dumps(records).encode(), seen.tag)
                break
            except Conflict:
                conflicts += 1
    return conflicts


OTHER = f"""
import json, sys
from bissl_zoo.zoo.stores import open_store
from bissl_zoo.zoo.stores.store import Conflict
{inspect.getsource(publish)}
def meet():
    print("ready", flush=True)
    sys.stdin.readline()
print(publish(open_store("hf://{REPO}"), "other", meet))
"""


def test_two_publishers_at_once_lose_no_record(store, hub):
    hub.commit({"index.json": b"{}"}, "by hand")
    environment = {**os.environ, "HF_ENDPOINT": hub.address}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OTHER], env=environment, **pipes) as other:

        def meet():
            assert other.stdout.readline() == "ready\n"
            other.stdin.write("go\n")
            other.stdin.flush()

        conflicts = publish(store, "this", meet) + int(other.communicate(timeout=60)[0])
    expected = {f"{who}-{number}": number for who in ("this", "other") for number in range(10)}
    assert json.loads(hub.files()["index.json"]) == expected
    assert all(f"{name}/entry.json" in hub.files() for name in expected)
    assert conflicts > 0


def test_a_repository_that_does_not_exist_is_told_how_to_create(hub):
    store = HubStore("hf://lab/absent")
    for use in (lambda: store.read("index.json", 10), lambda: store.replace("index.json", b"", None)):
        with pytest.raises(ZooError, match="no repository lab/absent.*hf repo create lab/absent.*hf auth login"):
            use()


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "lab/zoo is gated: accept its terms"),
        (401, {}, "hf auth login.*HF_TOKEN"),
        (403, {}, "hf auth login.*may write"),
        (404, {"X-Error-Code": "RepoNotFound"}, "hf repo create"),
    ],
)
def test_a_refusal_says_what_to_do(store, hub, status, headers, message):
    hub.answer_with = lambda command, path: (status, headers)
    with pytest.raises(ZooError, match=message) as caught:
        store.read("index.json", 10)
    assert not isinstance(caught.value, Transient)


def test_publishing_without_a_token_that_may_write_says_so(store, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_ofareader")
    store.create("x/entry.json", b"{}")
    with pytest.raises(ZooError, match="403.*HF_TOKEN.*may write"):
        store.replace("index.json", b"1", hub.head)


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_a_busy_or_broken_hub_is_worth_another_attempt(store, hub, status):
    hub.answer_with = lambda command, path: (status, {})
    with pytest.raises(Transient, match="hf://lab/zoo"):
        store.read("index.json", 10)
    hub.answer_with = lambda command, path: (status, {}) if "/resolve/" in path else None
    with pytest.raises(Transient, match="hf://lab/zoo/x/model"):
        drain(store, "x/model")


def test_a_body_that_breaks_off_is_worth_another_attempt(store, hub):
    hub.answer_with = lambda command, path: (200, {"Content-Length": "9", "Connection": "close"})
    with pytest.raises(Transient, match="hf://lab/zoo/x/model"):
        drain(store, "x/model")


def test_what_the_reader_of_a_body_raises_is_not_taken_for_the_hubs(store, hub):
    hub.commit({"x/model": b"content"}, "by hand")
    with pytest.raises(OSError, match="disk full"), store.open("x/model"):
        raise OSError("disk full")


def test_a_commit_whose_answer_is_lost_counts_as_made(store, hub, monkeypatch):
    sent = HubHandler.send

    def lose(handler, status, *rest):
        return sent(handler, 0 if "/commit/" in handler.path and status == 200 else status, *rest)

    monkeypatch.setattr(HubHandler, "send", lose)
    store.create("x/entry.json", b"{}")
    store.replace("index.json", b"1", hub.head)
    assert hub.messages == ["initial commit", "Publish x"]
    hub.answer_with = lambda command, path: (0, {}) if "/commit/" in path else None
    with pytest.raises(Transient):
        store.replace("index.json", b"2", hub.head)
    assert hub.files()["index.json"] == b"1"


def test_offline_mode_is_told(store, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True, raising=False)
    with pytest.raises(ZooError, match="HF_HUB_OFFLINE"):
        store.read("index.json", 10)


@pytest.mark.parametrize(
    "location", ["hf://", "hf://lab", "hf://lab/zoo/folder", "hf://datasets/lab/zoo", "hf://lab/zoo@"]
)
def test_an_address_that_is_none_is_refused(location):
    with pytest.raises(ZooError, match="hf://USER/REPO@REVISION"):
        HubStore(location)


def test_without_the_library_or_with_an_old_one_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "__version__", "0.36.0")
    with pytest.raises(ZooError, match=r'1\.0 or newer, and 0\.36\.0 is installed.*"bissl_zoo\[hub\]"'):
        HubStore(f"hf://{REPO}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ZooError, match=r'pip install "bissl_zoo\[hub\]"'):
        HubStore(f"hf://{REPO}")


def test_timm_loads_an_entry_from_a_repository_of_its_own(hub, tmp_path):
    entry = publish_tiny(tmp_path / "zoo", seed=7)
    torch.manual_seed(7)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    hub.commit({path.name: path.read_bytes() for path in Path(entry.location).iterdir()}, "hf upload")
    load = f"timm.create_model('hf-hub:{REPO}', pretrained=True)"
    code = f"import timm, torch; model = {load}; torch.save(model.state_dict(), {str(tmp_path / 'loaded.pt')!r})"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], value) for key, value in state.items())
