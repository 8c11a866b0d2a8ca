import subprocess
import sys
from pathlib import Path

import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import stores
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.stores import Missing, Store, open_store, register_store
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.http import HttpStore
from bissl_zoo.zoo.stores.huggingface import HuggingFaceStore


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE://{}", "file://localhost{}"])
def test_a_path_and_its_address_open_the_same_folder(tmp_path, form):
    folder = tmp_path / "my zoo"
    folder.mkdir()
    location = form.format(str(folder).replace(" ", "%20") if "://" in form else folder)
    store = open_store(location)
    assert isinstance(store, FolderStore) and store.root == folder
    assert open_store(Path(folder)).root == folder


def test_the_scheme_selects_the_store():
    assert isinstance(open_store("HTTPS://host/zoo"), HttpStore)
    assert isinstance(open_store("hf://user/repo"), HuggingFaceStore)


def test_an_unknown_scheme_suggests_a_known_one():
    with pytest.raises(ZooError, match="Did you mean 'https'.*register_store"):
        open_store("htps://host/zoo")


def test_an_address_with_lost_slashes_is_not_a_folder_unless_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZooError, match="begins with '//' after its scheme"):
        open_store("https:/host/zoo")
    (tmp_path / "s3:x").mkdir()
    assert open_store("s3:x").root == Path("s3:x")


def test_a_file_address_of_another_host_is_refused():
    with pytest.raises(ZooError, match="file:///FOLDER"):
        open_store("file://host/zoo")


def test_a_user_can_register_a_store(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "_STORES", dict(stores._STORES))

    class Shelf(Store):
        def __init__(self, location):
            self.location = location

        def read(self, path, start=0):
            if path != "index.json":
                raise Missing(path)
            yield b'{"format": 1, "entries": {}}'[start:]

    register_store("shelf", Shelf)
    assert isinstance(open_store("shelf://x"), Shelf)
    assert Zoo("shelf://x").entries() == {}


@pytest.mark.slow
def test_listing_a_zoo_does_not_import_torch(tmp_path):
    code = (
        "import sys; from bissl_zoo.zoo.hub import Zoo; from bissl_zoo.zoo import commands; "
        f"Zoo({str(tmp_path)!r}).entries(); print({{'torch', 'timm', 'huggingface_hub'}} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
