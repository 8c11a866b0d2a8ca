"""Publishers and removals that are killed, interrupted, refused or raced at every step."""

import functools
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import timm
import torch
from scripted_s3 import use_server

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import create_backbone, publish_entry
from bissl_zoo.zoo.download import retrying
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import INDEX_FILE
from bissl_zoo.zoo.maintenance import verify
from bissl_zoo.zoo.page import PAGE_FILE, render_page
from bissl_zoo.zoo.stores import WritableStore, open_store
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.store import Transient
from bissl_zoo.zoo.transactions import CLAIM_FILE, read_claim, read_index, remove_entry, write_page

FILES = {"model.safetensors", "config.json", "entry.json", "train_config.yaml", "README.md", "metrics.png"}
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def publish(zoo, name="tiny", seed=0):
    """Publish a small entry; the same function runs in this process and in those that are killed."""
    torch.manual_seed(seed)
    return publish_entry(
        name=name,
        backbone_state=timm.create_model("test_resnet", num_classes=0).state_dict(),
        architecture="test_resnet",
        pretrained_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]},
        metadata={"pretext": "simclr", "metrics": {"top1": 0.5}, "seeds": [0]},
        train_config_text="train: {}\n",
        zoo=zoo,
    )


#: one process forks a child per kill; the child counts what it does in the zoo and dies before the n-th
KILLS = """
import os, signal, shutil, sys
import timm, torch
import matplotlib.figure
from bissl_zoo.zoo import publish_entry
from bissl_zoo.zoo.stores import open_store
from bissl_zoo.zoo.transactions import remove_entry

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"}
PUBLISH

def is_change(event, arguments):
    if event == "open":
        _, mode, flags = arguments
        return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set("wxa+") & set(mode or "")
    return event in CHANGES

def run(zoo, number, act):
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if not arguments or not is_change(event, arguments):
            return
        if not any(isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(zoo) for a in arguments):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    act(zoo)

def kill_each(base, act, step):
    publish(base + "-warm")  # what is imported on first use is imported once
    for number in range(1, 1000, step):
        zoo = f"{base}-{number}"
        if os.path.isdir(base):
            shutil.copytree(base, zoo)
        child = os.fork()
        if child == 0:
            try:
                run(zoo, number, act)
                os._exit(0)
            except BaseException as error:
                print("error", repr(error), flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(zoo, child, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
        if not os.WIFSIGNALED(status):
            return

acts = {"publish": publish, "remove": lambda zoo: remove_entry(open_store(zoo), "tiny")}
kill_each(sys.argv[1], acts[sys.argv[2]], int(sys.argv[3]))
"""


def kill_each(base, what, step=1):
    """The zoos that were left, one for every `step`-th kill, and a last one, where nothing was left to kill."""
    code = KILLS.replace("PUBLISH", inspect.getsource(publish))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(base), what, str(step)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    told = [line.split() for line in done.stdout.splitlines()]
    zoos = [Path(zoo) for zoo, _, _ in told]
    assert [int(status) for *_, status in told] == [signal.SIGKILL] * (len(told) - 1) + [0], done.stdout
    return zoos


def whole(zoo, name):
    """Whether every file of an entry is what the index lists."""
    entry = Zoo(zoo).find(name if "@" in name else f"{name}@1")
    assert set(entry.record["files"]) == FILES
    for file in entry.record["files"]:
        entry.file(file)
    return True


def repair(store):
    """Repair all that can be, twice as a person would, and return what is left."""
    for finding in list(verify(store)):
        if finding.repair:
            finding.repair()
    return list(verify(store))


def left_clean(zoo, names):
    """Whether a folder zoo holds what its index lists and nothing else."""
    found = {path.name for path in Path(zoo).iterdir() if not (path.is_dir() and not any(path.iterdir()))}
    return found - {".lock", ".pending"} == {*names, INDEX_FILE, PAGE_FILE}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A zoo with the entry `tiny`, not to be changed."""
    root = tmp_path_factory.mktemp("one") / "zoo"
    publish(root)
    return root


@pytest.fixture
def zoo(one, tmp_path):
    return Path(shutil.copytree(one, tmp_path / "zoo"))


@POSIX
def test_a_publisher_killed_at_any_step_leaves_a_whole_zoo_that_repair_mends(zoo):
    zoos = kill_each(zoo, "publish")
    assert len(zoos) > 20
    for place in zoos:
        listed = set(Zoo(place).entries())
        assert listed in ({"tiny"}, {"tiny", "tiny@2"})
        assert all(whole(place, name) for name in listed)
        assert torch.isfinite(create_backbone("tiny", zoo=place).state_dict()["conv1.0.weight"]).all()
        assert repair(FolderStore(place)) == []
        assert left_clean(place, listed)
        again = publish(place, seed=1)
        assert again.name == f"tiny@{len(listed) + 1}" and whole(place, again.name)
        assert list(verify(FolderStore(place))) == [] and left_clean(place, {*listed, again.name})
    for place in (zoos[3], zoos[-2]):
        timm.create_model(f"local-dir:{place / 'tiny@2'}", pretrained=True)
    assert set(Zoo(zoos[-1]).entries()) == {"tiny", "tiny@2", "tiny@3"}


@POSIX
def test_the_first_publisher_of_a_zoo_may_be_killed_at_any_step_too(tmp_path):
    zoos = kill_each(tmp_path / "zoo", "publish", step=6)
    assert len(zoos) > 4
    for place in zoos:
        listed = set(Zoo(place).entries())
        assert listed in (set(), {"tiny"}) and all(whole(place, name) for name in listed)
        assert repair(FolderStore(place)) == []
        assert publish(place, seed=1).name == ("tiny@2" if listed else "tiny")
        assert list(verify(FolderStore(place))) == []


@POSIX
def test_a_removal_killed_at_any_step_is_finished_by_repair(zoo):
    publish(zoo, seed=1)
    zoos = kill_each(zoo, "remove")
    assert len(zoos) > 10
    for place in zoos:
        listed = set(Zoo(place).entries())
        assert listed in ({"tiny", "tiny@2"}, {"tiny@2"}) and all(whole(place, name) for name in listed)
        assert repair(FolderStore(place)) == []
        assert left_clean(place, listed)
        assert publish(place, seed=2).name == "tiny@3"


@POSIX
@pytest.mark.parametrize("limit", [40, 200_000])
def test_a_publisher_killed_in_the_middle_of_a_file_leaves_what_repair_removes(zoo, limit):
    before = read_index(FolderStore(zoo))
    code = f"""
import resource, signal, sys
import timm, torch
from bissl_zoo.zoo import publish_entry
from bissl_zoo.zoo.stores import folder
{inspect.getsource(publish)}
copy = folder._copy
def limited(source, target):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    copy(source, target)
folder._copy = limited
publish({str(zoo)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait(timeout=120) == -signal.SIGXFSZ
    cut = [path for path in (zoo / "tiny@2").iterdir() if path.stat().st_size == limit]
    assert len(cut) == 1 and (limit != 40 or read_claim(cut[0].read_bytes()) == {})
    assert read_index(FolderStore(zoo)) == before
    assert repair(FolderStore(zoo)) == [] and left_clean(zoo, {"tiny"})
    assert publish(zoo).name == "tiny@2"


class Faulty(WritableStore):
    """A folder whose n-th operation fails, before or after it is done; those that follow work again, or do not."""

    def __init__(self, root, number, error, after=False, forever=False):
        self.inner = FolderStore(root)
        self.location = self.inner.location
        self.number, self.error, self.after, self.forever = number, error, after, forever
        self.count = 0

    def _do(self, name, *arguments):
        self.count += 1
        fails = self.count == self.number or (self.forever and self.count > self.number)
        if fails and not self.after:
            raise self.error
        result = getattr(self.inner, name)(*arguments)
        if fails:
            raise self.error
        return result

    def read(self, path, limit):
        return self._do("read", path, limit)

    def open(self, path, offset=0):
        return self._do("open", path, offset)

    def create(self, path, source):
        self._do("create", path, source)

    def replace(self, path, content, tag):
        self._do("replace", path, content, tag)

    def folders(self):
        return self._do("folders")

    def remove_folder(self, name):
        self._do("remove_folder", name)

    def remove(self, path):
        self._do("remove", path)


def zoo_of(store):
    found = Zoo(store.location)
    found.stores = [store]
    return found


@pytest.fixture
def at_once(monkeypatch):
    """Attempts follow each other without waiting."""
    patient = functools.partial(retrying, sleep=lambda seconds: None)
    monkeypatch.setattr("bissl_zoo.zoo.transactions.retrying", patient)
    monkeypatch.setattr("bissl_zoo.zoo.maintenance.retrying", patient)


def at_each_operation(one, tmp_path, act, **fault):
    """Run `act(store)` with a fault at every operation in turn: the folder, and what was raised or None."""
    for number in range(1, 1000):
        root = Path(shutil.copytree(one, tmp_path / str(number)))
        store = Faulty(root, number, **fault)
        raised = None
        try:
            act(store)
        except (ZooError, KeyboardInterrupt) as error:
            raised = error
        if store.count < number:
            assert raised is None and number > 5
            return
        yield root, raised
    raise AssertionError("never came to an end")


def forget_process(root):
    """Let the claims of this process, which lives, be those of one that does not."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    for claim in root.glob(f"*/{CLAIM_FILE}"):
        claim.write_bytes(json.dumps({**json.loads(claim.read_bytes()), "pid": process.pid}).encode())


def check_after_fault(root, raised, added):
    """What holds after every fault: nothing listed without its files, and a zoo that repair makes clean."""
    listed = set(Zoo(root).entries())
    assert all(whole(root, name) for name in listed)
    assert listed in ({"tiny"}, {"tiny", added})
    assert raised is not None or added in listed
    forget_process(root)
    assert repair(FolderStore(root)) == []
    assert left_clean(root, listed)
    assert set(Zoo(root).entries()) == listed


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_one_passing_failure_anywhere_does_not_stop_a_publisher(one, tmp_path, at_once, after):
    fault = {"error": Transient("busy"), "after": after}
    outcomes = []
    for root, raised in at_each_operation(one, tmp_path, lambda store: publish(zoo_of(store), "new"), **fault):
        check_after_fault(root, raised, "new")
        outcomes.append(raised)
    assert len(outcomes) > 15
    if after:  # a file that arrived without an answer is taken for somebody else's; all is undone
        assert all("exists already" in str(raised) for raised in outcomes if raised)
    else:
        assert outcomes == [None] * len(outcomes)


@pytest.mark.parametrize("error", [ZooError("refused"), Transient("gone")], ids=["refusal", "network"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_store_that_fails_for_good_leaves_a_zoo_that_repair_mends(one, tmp_path, at_once, error, after):
    fault = {"error": error, "after": after, "forever": True}
    for root, raised in at_each_operation(one, tmp_path, lambda store: publish(zoo_of(store), "new"), **fault):
        check_after_fault(root, raised, "new")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ctrl_c_anywhere_leaves_the_zoo_as_it_was_or_the_entry_whole(one, tmp_path, after):
    fault = {"error": KeyboardInterrupt(), "after": after}
    for root, raised in at_each_operation(one, tmp_path, lambda store: publish(zoo_of(store), "new"), **fault):
        assert isinstance(raised, KeyboardInterrupt)
        check_after_fault(root, raised, "new")
        if "new" not in Zoo(root).entries():
            assert left_clean(root, {"tiny"})


@pytest.mark.parametrize("error", [ZooError("refused"), Transient("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_removal_that_fails_anywhere_is_finished_by_repair(one, tmp_path, at_once, error, after):
    fault = {"error": error, "after": after}
    for root, raised in at_each_operation(one, tmp_path, lambda store: remove_entry(store, "tiny"), **fault):
        listed = set(Zoo(root).entries())
        assert all(whole(root, name) for name in listed)
        assert raised is not None or not listed
        assert repair(FolderStore(root)) == [] and left_clean(root, listed)


def test_a_page_that_cannot_be_written_does_not_make_a_published_entry_a_failure(zoo, caplog):
    (zoo / PAGE_FILE).unlink()
    (zoo / PAGE_FILE).mkdir()
    assert publish(zoo).name == "tiny@2"
    assert "MODEL_ZOO.md is not up to date" in caplog.text and "verify --repair" in caplog.text


def test_a_claim_names_host_process_and_time_and_reads_as_nothing_when_cut_short(zoo):
    seen = []
    store = FolderStore(zoo)
    create = store.create

    def spy(path, source):
        create(path, source)
        if path.endswith(CLAIM_FILE):
            seen.append((path, read_claim(Path(zoo / path).read_bytes())))

    store.create = spy
    publish(zoo_of(store))
    ((path, claim),) = seen
    assert path == f"tiny@2/{CLAIM_FILE}"
    assert (claim["host"], claim["pid"]) == (socket.gethostname(), os.getpid())
    for cut in (b"", b'{"host": "x', b"[1]", b"\xff", b"[" * 100_000):
        assert read_claim(cut) == {}


def test_whoever_comes_late_to_a_name_lets_the_finished_entry_be(one, tmp_path):
    """The index that a publisher reads may be older than the claim it tries: between them another one finishes."""
    root = Path(shutil.copytree(one, tmp_path / "zoo"))
    store = FolderStore(root)
    folders = store.folders

    def late():
        store.folders = folders
        before = [name for name in folders() if name != "other"]
        publish(root, "other")
        return before

    store.folders = late
    assert publish(zoo_of(store), "other", seed=1).name == "other@2"
    assert whole(root, "other@1") and whole(root, "other@2") and left_clean(root, {"tiny", "other", "other@2"})


def test_the_page_follows_whoever_lists_an_entry_while_it_is_written(zoo):
    store = FolderStore(zoo)
    replace = store.replace

    def meanwhile(path, content, tag):
        store.replace = replace
        publish(zoo, "other")
        replace(path, content, tag)

    (zoo / PAGE_FILE).unlink()
    store.replace = meanwhile
    write_page(store)
    assert (zoo / PAGE_FILE).read_text() == render_page(read_index(store)[0]) and "other" in Zoo(zoo).entries()


def test_a_removed_name_is_never_used_again(zoo):
    publish(zoo, seed=1)
    for name in ("tiny@2", "tiny"):
        remove_entry(FolderStore(zoo), name)
    assert json.loads((zoo / INDEX_FILE).read_text())["removed"] == ["tiny@2", "tiny"]
    assert publish(zoo, seed=2).name == "tiny@3"
    with pytest.raises(ZooError, match="lists no entry 'tiny@2', so there is nothing to remove"):
        remove_entry(FolderStore(zoo), "tiny@2")


def test_an_entry_whose_files_are_gone_can_be_removed(zoo):
    shutil.rmtree(zoo / "tiny")
    remove_entry(FolderStore(zoo), "tiny")
    assert list(verify(FolderStore(zoo))) == [] and Zoo(zoo).entries() == {}


S3_PUBLISHERS = """
import os, signal, sys
import timm, torch
import matplotlib.figure
from bissl_zoo.zoo import publish_entry
from bissl_zoo.zoo.stores.s3 import S3Store
PUBLISH
if sys.argv[1] == "race":
    print("ready", flush=True)
    sys.stdin.readline()
    print(*[publish(sys.argv[2]).name for _ in range(int(sys.argv[3]))])
    sys.exit()
publish(sys.argv[3])
for number in range(int(sys.argv[5]), 1000, 7):
    child = os.fork()
    if child == 0:
        from botocore.httpsession import URLLib3Session
        send, seen = URLLib3Session.send, [0]
        def counted(self, request):
            seen[0] += 1
            if seen[0] == number and sys.argv[4] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            answer = send(self, request)
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer
        URLLib3Session.send = counted
        try:
            publish(f"{sys.argv[2]}-{number}")
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(number, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""

SERVER = """
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """`s3://zoo` of a server in a process of its own, one request at a time (moto writes in two steps)."""
    boto3 = pytest.importorskip("boto3", reason='S3 needs boto3: pip install "bissl_zoo[s3]"')
    pytest.importorskip("moto", minversion="5.1.5", reason='the S3 server of these tests: pip install "moto[server]"')
    log = open(tmp_path_factory.mktemp("moto") / "log", "wb")
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=log)
    try:
        with pytest.MonkeyPatch.context() as patch:
            use_server(patch, f"http://127.0.0.1:{int(process.stdout.readline())}")
            boto3.client("s3").create_bucket(Bucket="zoo")
            yield f"s3://zoo/{uuid.uuid4().hex}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
        log.close()


def s3_publishers(*arguments):
    code = S3_PUBLISHERS.replace("PUBLISH", inspect.getsource(publish))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@POSIX
@pytest.mark.parametrize("moment, first", [("before", 2), ("after", 5)])
def test_a_publisher_killed_at_a_request_to_s3_leaves_a_zoo_that_repair_mends(bucket, moment, first):
    base = f"{bucket}/{moment}"
    killing = s3_publishers("kill", base, f"{base}-warm", moment, str(first))
    told = [line.split() for line in killing.communicate()[0].splitlines()]
    assert [int(status) for _, status in told] == [signal.SIGKILL] * (len(told) - 1) + [0], told
    assert len(told) > 3
    for number, _ in told:
        store = open_store(f"{base}-{number}")
        listed = set(Zoo(store.location).entries())
        assert listed in (set(), {"tiny"}) and all(whole(store.location, name) for name in listed)
        assert repair(store) == []
        again = publish(store.location, seed=1)
        assert whole(store.location, again.name) and list(verify(store)) == []
        assert len(Zoo(store.location).entries()) == len(listed) + 1


def test_two_publishers_to_s3_lose_nothing(bucket):
    location = f"{bucket}/race"
    publishers = [s3_publishers("race", location, "4") for _ in range(2)]
    for process in publishers:
        assert process.stdout.readline() == "ready\n"
    for process in publishers:
        process.stdin.write("go\n")
        process.stdin.flush()
    names = " ".join(process.communicate(timeout=300)[0] for process in publishers).split()
    expected = {"tiny", *(f"tiny@{version}" for version in range(2, 9))}
    assert len(names) == 8 and set(names) == expected == set(Zoo(location).entries())
    assert all(whole(location, name) for name in expected)
    store = open_store(location)
    page = store.read(PAGE_FILE, 1 << 20).content.decode()
    assert page == render_page(read_index(store)[0]) and all(f"[{name}]" in page for name in expected)
    assert list(verify(store)) == []
