import os
import subprocess
import sys
from pathlib import Path

import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import open_store, writable
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.http import HttpStore
from bissl_zoo.zoo.stores.huggingface import HubStore
from bissl_zoo.zoo.stores.remote import BUILT_IN, RemoteStore


@pytest.fixture
def no_aws(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


@pytest.mark.parametrize("text", ["{}", "{}/", "file://{}", "FILE://{}", "file://localhost{}"])
def test_a_path_and_its_address_are_the_same_folder(tmp_path, text):
    store = open_store(text.format(tmp_path))
    assert isinstance(store, FolderStore) and store.root == tmp_path


def test_a_path_may_be_a_path_object_or_relative_or_quoted_in_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store(tmp_path).root == tmp_path
    assert open_store("zoo").root == Path("zoo")
    assert open_store("file:///a%20zoo").root == Path("/a zoo")


@pytest.mark.parametrize(
    ("location", "kind", "shown"),
    [
        ("https://host/zoo", HttpStore, "https://host/zoo"),
        ("HTTP://host/zoo", HttpStore, "http://host/zoo"),
        ("hf://lab/zoo", HubStore, "hf://lab/zoo"),
        ("HF://lab/zoo@v1", HubStore, "hf://lab/zoo@v1"),
        ("memory://zoo", RemoteStore, "memory://zoo"),
    ],
)
def test_the_scheme_says_which_store(location, kind, shown):
    store = open_store(location)
    assert type(store) is kind and store.location == shown


def test_s3_has_a_store_of_its_own(no_aws):
    pytest.importorskip("boto3", reason='S3 needs boto3: pip install "bissl_zoo[s3]"')
    assert open_store("S3://bucket/zoo/").location == "s3://bucket/zoo"


@pytest.mark.parametrize(
    ("location", "near"),
    [("htps://host/zoo", "https"), ("hff://lab/zoo", "hf"), ("s33://bucket", "s3"), ("memry://zoo", "memory")],
)
def test_a_misspelt_scheme_names_the_nearest(location, near):
    with pytest.raises(ZooError, match=f"is not known. Did you mean '{near}'") as caught:
        open_store(location)
    assert all(f"{scheme}://" in str(caught.value) for scheme in BUILT_IN)


@pytest.mark.parametrize(
    ("location", "meant"),
    [("s3:/bucket/zoo", "s3://bucket/zoo"), ("https:host/zoo", "https://host/zoo"), ("file:/zoo", "file:///zoo")],
)
def test_an_address_without_its_slashes_is_not_taken_for_a_folder(location, meant):
    with pytest.raises(ZooError, match=f"no folder '{location}'. Did you mean '{meant}'"):
        open_store(location)


def test_a_folder_that_looks_like_such_an_address_is_one_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:zoo").mkdir()
    assert open_store("s3:zoo").root == Path("s3:zoo")


@pytest.mark.parametrize("location", ["file://host/zoo", "file://zoo", "file://"])
def test_a_file_address_of_another_host_is_refused(location):
    with pytest.raises(ZooError, match="write file:///FOLDER or its path"):
        open_store(location)


def test_stores_that_can_be_published_to_are_passed_on(tmp_path):
    for store in (open_store(tmp_path), open_store("hf://lab/zoo")):
        assert writable(store) is store


@pytest.mark.parametrize("location", ["https://host/zoo", "memory://zoo"])
def test_publishing_to_a_place_for_reading_says_where_one_can_and_in_which_order_to_copy(location):
    with pytest.raises(
        ZooError, match=f"{location} can be read from, but not.*s3://.*hf://.*folders first.*index.json last"
    ):
        writable(open_store(location))


def test_libraries_are_imported_for_the_schemes_that_need_them_only(tmp_path):
    program = (
        "import sys\n"
        "from bissl_zoo.zoo.stores import open_store\n"
        f"open_store({str(tmp_path)!r})\n"
        "ours = ['http', 'huggingface', 'remote', 's3']\n"
        "print([n for n in ['boto3', *(f'bissl_zoo.zoo.stores.{m}' for m in ours)] if n in sys.modules])\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"
