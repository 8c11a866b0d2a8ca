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
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import parse_index
from bissl_zoo.zoo.stores import Missing, Transient
from bissl_zoo.zoo.stores.huggingface import HuggingFaceStore

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # the protocol of xet is not part of the server of these tests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("bissl_zoo.zoo.stores.huggingface.time.sleep", lambda seconds: None)
    server = Hub()
    # as HF_ENDPOINT sets them when huggingface_hub is imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(hub):
    return HuggingFaceStore(f"hf://{REPO}")


def read(store, path, start=0):
    return b"".join(store.read(path, start))


def index_of(hub):
    return parse_index(hub.files().get("index.json"), "hub")


def test_publishing_is_one_commit_and_the_entry_loads(store, hub, tmp_path):
    assert publish_tiny(store.location, seed=1).location == f"hf://{REPO}/tiny"
    assert hub.messages == ["initial commit", "Publish tiny"]
    files = {f"tiny/{file}" for file in index_of(hub).records["tiny"]["files"]}
    assert set(hub.files()) == {".gitattributes", "index.json", "MODEL_ZOO.md", *files}
    zoo = Zoo(store.location, cache=Cache(tmp_path / "cache"))
    assert zoo.find("tiny").weights().keys() == timm.create_model("test_resnet", num_classes=0).state_dict().keys()
    assert publish_tiny(store.location, seed=2).name == "tiny@2"


def test_files_are_read_from_any_byte_and_the_token_stays_at_the_hub(store, hub):
    content = os.urandom(3 << 20)
    hub.commit({"x@2/model.safetensors": content, "x@2/entry.json": b"12345"}, "by hand")
    assert read(store, "x@2/model.safetensors") == content
    assert read(store, "x@2/model.safetensors", 2_000_001) == content[2_000_001:]
    assert read(store, "x@2/entry.json", 2) == b"345"
    sent = {path.split("/")[1]: headers.get("Authorization") for _, path, headers in hub.seen}
    assert sent.pop("cdn") is None and set(sent.values()) == {f"Bearer {TOKEN}"}


def test_a_missing_file_is_missing_and_a_large_one_refused(store, hub, monkeypatch):
    assert store.read_index("index.json") is None
    with pytest.raises(Missing, match="hf://lab/zoo/x/model does not exist"):
        read(store, "x/model")
    hub.commit({"index.json": b"12345"}, "by hand")
    monkeypatch.setenv("BISSL_ZOO_MAX_INDEX_BYTES", "4")
    with pytest.raises(ZooError, match="the limit is 4"):
        store.read_index("index.json")


def test_a_revision_is_read_as_it_was(store, hub):
    hub.commit({"index.json": b"old"}, "by hand")
    old = hub.head
    hub.commit({"index.json": b"new"}, "by hand")
    assert HuggingFaceStore(f"hf://{REPO}@{old}").read_index("index.json") == b"old"
    assert store.read_index("index.json") == b"new"
    with pytest.raises(ZooError, match="lab/zoo has no revision 'v7'"):
        HuggingFaceStore(f"hf://{REPO}@v7").publish(None)


def test_concurrent_publishers_lose_nothing(hub):
    names, errors = [], []

    def publish(seed):
        try:
            names.append(publish_tiny(f"hf://{REPO}", seed=seed).name)
        except ZooError as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and set(names) == {"tiny", "tiny@2", "tiny@3", "tiny@4"} == set(index_of(hub).records)
    assert all(f"{name}/model.safetensors" in hub.files() for name in names)


def test_an_entry_is_removed_in_one_commit_and_its_name_is_not_used_again(store, hub):
    publish_tiny(store.location)
    store.remove("tiny")
    assert hub.messages[-1] == "Remove tiny" and set(hub.files()) == {".gitattributes", "index.json", "MODEL_ZOO.md"}
    assert publish_tiny(store.location).name == "tiny@2"
    with pytest.raises(ZooError, match="lists no entry 'tiny'"):
        store.remove("tiny")


def test_a_commit_whose_answer_is_lost_is_not_repeated(store, hub, monkeypatch):
    send, lost = HubHandler.send, []

    def lose(handler, status, *rest):
        if "/commit/" in handler.path and status == 200 and not lost:
            lost.append(status)
            status = 0
        return send(handler, status, *rest)

    monkeypatch.setattr(HubHandler, "send", lose)
    assert publish_tiny(store.location).name == "tiny"
    assert lost and hub.messages == ["initial commit", "Publish tiny"]


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "hub answered 403.*hf auth login"),
        (401, {}, "hub answered 401.*write.*HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, "hf repo create lab/zoo"),
    ],
)
def test_an_error_names_the_solution(store, hub, status, headers, message):
    hub.answer_with = lambda command, path: (status, headers)
    for use in (lambda: store.read_index("index.json"), lambda: store.publish(None)):
        with pytest.raises(ZooError, match=message) as caught:
            use()
        assert not isinstance(caught.value, Transient)


@pytest.mark.parametrize("status", [0, 503])
def test_a_busy_or_broken_hub_is_transient(store, hub, status):
    hub.commit({"x/model": b"12345"}, "by hand")
    hub.answer_with = lambda command, path: (status, {}) if "/resolve/" in path else None
    with pytest.raises(Transient, match="hf://lab/zoo/x/model"):
        read(store, "x/model")


@pytest.mark.parametrize("location", ["hf://", "hf://lab", "hf://lab/zoo/folder", "hf://lab/zoo@"])
def test_an_invalid_address_is_refused(location):
    with pytest.raises(ZooError, match="hf://USER/REPO@REVISION"):
        HuggingFaceStore(location)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ZooError, match=r'pip install "bissl_zoo\[hub\]"'):
        HuggingFaceStore(f"hf://{REPO}")


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
