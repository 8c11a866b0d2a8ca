import sys

import pytest
from tiny_entries import publish_tiny

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.checks import open_config
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import PRETEXT_METHODS

QUICKSTART = "quickstart/digit_scenes_det.py"
METHOD = """
from bissl_zoo.pretext import SimCLR
from bissl_zoo.registry import PRETEXT_METHODS

@PRETEXT_METHODS.register("{name}")
class Mine(SimCLR):
    pass
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that registers a method under its own name, and is forgotten after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"method_{tmp_path.name}"
    path = tmp_path / f"{name}.py"
    path.write_text(METHOD.format(name=name))
    yield path
    sys.modules.pop(name, None)
    PRETEXT_METHODS._obj_map.pop(name, None)


def test_a_file_of_ones_own_is_imported_before_anything_is_built(file):
    assert file.stem not in PRETEXT_METHODS
    cfg = open_config(QUICKSTART, [f"train.imports=['{file}']"])
    assert file.stem in PRETEXT_METHODS and cfg.train.imports == [str(file)]


def test_a_saved_config_imports_it_again(file, tmp_path):
    cfg = open_config(QUICKSTART, [f"train.imports=['{file}']"])
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    PRETEXT_METHODS._obj_map.pop(file.stem)
    del sys.modules[file.stem]
    assert open_config(str(tmp_path / "config.yaml")) == cfg
    assert file.stem in PRETEXT_METHODS


def test_a_file_that_is_not_there_and_a_module_that_is_not_installed_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.imports: there is no file .*nowhere\.py"):
        open_config(QUICKSTART, [f"train.imports=['{tmp_path / 'nowhere.py'}']"])
    for module in ("no_such_package.part", "json.no_such_part"):
        with pytest.raises(ConfigError, match=f"there is no module '{module}'"):
            open_config(QUICKSTART, [f"train.imports=[{module}]"])


def test_an_error_inside_of_the_users_module_is_the_users_to_see(file):
    file.write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        open_config(QUICKSTART, [f"train.imports=['{file}']"])


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="has the name of another module"):
        open_config(QUICKSTART, [f"train.imports=['{tmp_path / 'json.py'}']"])


def test_code_that_a_zoo_entry_names_is_not_run_unasked(file, tmp_path, monkeypatch):
    cfg = LazyConfig.apply_overrides(load_config(QUICKSTART), [f"train.imports=['{file}']"])
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    publish_tiny(tmp_path / "zoo", config=(tmp_path / "config.yaml").read_text())
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    with pytest.raises(ConfigError, match="which is not run unasked"):
        open_config("zoo:tiny")
    assert file.stem not in PRETEXT_METHODS
    open_config("zoo:tiny", [f"train.imports=['{file}']"])
    assert file.stem in PRETEXT_METHODS
