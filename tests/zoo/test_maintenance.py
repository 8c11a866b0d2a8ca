"""`verify` and what it repairs, and whose claims are whose."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from tiny_entries import publish_tiny

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import INDEX_FILE
from bissl_zoo.zoo.maintenance import CLAIM_LIFETIME, verify
from bissl_zoo.zoo.page import PAGE_FILE
from bissl_zoo.zoo.serve import ZooServer
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.http import HttpStore
from bissl_zoo.zoo.transactions import CLAIM_FILE, remove_entry


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    for name in ("one", "two"):
        publish_tiny(root, name, pretext="simclr")
    return root


@pytest.fixture
def zoo(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "zoo"))


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def findings(zoo):
    return {finding.where: finding for finding in verify(FolderStore(zoo))}


def claim(zoo, name, **changes):
    """A folder claimed by this process now, or as told."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"host": socket.gethostname(), "pid": os.getpid(), "time": now, **changes}
    (zoo / name).mkdir(exist_ok=True)
    (zoo / name / CLAIM_FILE).write_text(json.dumps(content))
    return zoo / name


def test_a_sound_zoo_has_no_findings_and_every_entry_is_told(zoo):
    told = []
    assert list(verify(FolderStore(zoo), told.append)) == []
    assert told == ["one", "two"]
    assert list(verify(FolderStore(zoo.parent / "absent"))) == []


def test_every_damage_is_told_with_what_was_found_and_takes_a_person(zoo):
    weights, config, card = zoo / "one" / "model.safetensors", zoo / "one" / "config.json", zoo / "two" / "README.md"
    size, card_size = weights.stat().st_size, card.stat().st_size
    os.truncate(weights, 100)
    config.unlink()
    with open(card, "a") as stream:
        stream.write("more")
    entry = zoo / "two" / "entry.json"
    entry.write_bytes(entry.read_bytes().replace(b"simclr", b"simclz"))
    found = findings(zoo)
    assert found.keys() == {f"{p.parent.name}/{p.name}" for p in (weights, config, card, entry)}
    assert found["one/model.safetensors"].what == f"has 100 of {size} bytes"
    assert "does not exist" in found["one/config.json"].what
    assert found["two/README.md"].what == f"has more than {card_size} of {card_size} bytes"
    assert "and not" in found["two/entry.json"].what
    assert all(finding.repair is None and "publish it again" in finding.advice for finding in found.values())


def test_what_cannot_be_written_to_is_verified_as_well(zoo, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    os.truncate(zoo / "two" / "model.safetensors", 7)
    with ZooServer(zoo, port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        found = list(verify(HttpStore(server.address)))
        server.shutdown()
    assert [finding.where for finding in found] == ["two/model.safetensors"]


def test_an_index_that_cannot_be_used_stops_it(zoo):
    (zoo / INDEX_FILE).write_text("{")
    with pytest.raises(ZooError, match="cannot be read as JSON"):
        list(verify(FolderStore(zoo)))


def test_an_entry_that_is_being_published_is_told_and_left_alone(zoo):
    claim(zoo, "three")
    finding = findings(zoo)["three"]
    assert finding.what.startswith(f"is being published by process {os.getpid()} on {socket.gethostname()} since ")
    assert finding.repair is None and finding.advice == "wait for it, or end it"
    recent = (datetime.now(timezone.utc) - CLAIM_LIFETIME + timedelta(hours=1)).isoformat()
    claim(zoo, "three", host="elsewhere", pid=1, time=recent)
    assert findings(zoo)["three"].what.startswith("is being published by process 1 on elsewhere")
    assert (zoo / "three" / CLAIM_FILE).exists()


OLD = (datetime.now(timezone.utc) - CLAIM_LIFETIME - timedelta(hours=1)).isoformat()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "dead"},
        {"host": "elsewhere", "time": OLD},
        {"pid": 10**30},
        {"pid": float("inf")},
        {"pid": None},
        {"time": "yesterday"},
        {"time": "2020-01-01"},
        {"time": 5},
    ],
)
def test_what_nobody_is_publishing_any_more_is_removed(zoo, dead, changes):
    changes = {key: dead if value == "dead" else value for key, value in changes.items()}
    folder = claim(zoo, "three", **changes)
    (folder / "model.safetensors").write_bytes(b"half")
    finding = findings(zoo)["three"]
    assert finding.what == "is left over from a killed publisher"
    finding.repair()
    assert not folder.exists() and findings(zoo) == {}
    finding.repair()  # somebody else may have done it


@pytest.mark.parametrize("content", [b"", b'{"host": "x", "pi', b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_claim_that_was_cut_short_is_nobodys(zoo, content):
    folder = claim(zoo, "three")
    (folder / CLAIM_FILE).write_bytes(content)
    findings(zoo)["three"].repair()
    assert not folder.exists()


def test_a_claim_left_in_a_complete_entry_goes_alone(zoo, dead):
    claim(zoo, "two", pid=dead)
    before = {path.name for path in (zoo / "two").iterdir()} - {CLAIM_FILE}
    finding = findings(zoo)[f"two/{CLAIM_FILE}"]
    assert finding.what == "is left over; the entry is complete"
    finding.repair()
    assert {path.name for path in (zoo / "two").iterdir()} == before and findings(zoo) == {}


def test_an_entry_listed_while_verifying_is_not_taken_for_a_leftover(zoo, dead):
    """The publisher lists it and is killed while `verify` reads the files of the others."""
    index = json.loads((zoo / INDEX_FILE).read_text())
    unlisted = {**index, "entries": {"one": index["entries"]["one"]}}
    (zoo / INDEX_FILE).write_text(json.dumps(unlisted))
    claim(zoo, "two", pid=dead)
    found = verify(FolderStore(zoo), lambda name: (zoo / INDEX_FILE).write_text(json.dumps(index)))
    assert [(finding.where, finding.what) for finding in found] == [
        (f"two/{CLAIM_FILE}", "is left over; the entry is complete")
    ]


def test_what_a_removal_left_is_removed(zoo):
    kept = shutil.copytree(zoo / "one", zoo.parent / "kept")
    remove_entry(FolderStore(zoo), "one")
    shutil.copytree(kept, zoo / "one")
    finding = findings(zoo)["one"]
    assert finding.what == "is left over from a removal"
    finding.repair()
    assert not (zoo / "one").exists() and findings(zoo) == {}


def test_a_folder_of_somebody_else_is_not_touched(zoo):
    (zoo / "notes").mkdir()
    (zoo / "notes" / "mine.txt").write_text("keep")
    (zoo / "empty").mkdir()
    finding = findings(zoo)["notes"]
    assert finding.repair is None and finding.what == "is a folder that the index does not list"
    assert findings(zoo).keys() == {"notes"}


def test_a_link_out_of_the_zoo_is_told_and_what_it_leads_to_is_not_touched(zoo):
    outside = zoo.parent / "outside"
    outside.mkdir()
    (outside / CLAIM_FILE).write_text("{}")
    (zoo / "three").symlink_to(outside)
    finding = findings(zoo)["three"]
    assert "leads out of the zoo" in finding.what and finding.repair is None
    index = json.loads((zoo / INDEX_FILE).read_text())
    index["removed"] = ["three"]
    (zoo / INDEX_FILE).write_text(json.dumps(index))
    assert findings(zoo)["three"].repair is None
    assert (outside / CLAIM_FILE).exists()


@pytest.mark.parametrize("content", [None, "# My own page\n"])
def test_a_page_that_is_not_what_the_index_says_is_written_anew(zoo, content):
    page = zoo / PAGE_FILE
    expected = page.read_text()
    page.unlink()
    if content:
        page.write_text(content)
    findings(zoo)[PAGE_FILE].repair()
    assert page.read_text() == expected and findings(zoo) == {}
    assert set(Zoo(zoo).entries()) == {"one", "two"}
