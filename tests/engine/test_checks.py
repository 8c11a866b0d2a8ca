"""Opening a config and checking it before a run."""

import sys

import pytest
from tiny_entries import publish_tiny

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.checks import check_config, open_config
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


def test_a_file_of_train_imports_is_imported_when_the_config_is_opened(file):
    assert file.stem not in PRETEXT_METHODS
    cfg = open_config(QUICKSTART, [f"train.imports=['{file}']"])
    assert file.stem in PRETEXT_METHODS and cfg.train.imports == [str(file)]


@pytest.mark.slow
def test_a_missing_file_and_a_missing_module_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.imports: there is no file .*nowhere\.py"):
        open_config(QUICKSTART, [f"train.imports=['{tmp_path / 'nowhere.py'}']"])
    for module in ("no_such_package.part", "json.no_such_part"):
        with pytest.raises(ConfigError, match=f"there is no module '{module}'"):
            open_config(QUICKSTART, [f"train.imports=[{module}]"])


def test_an_error_inside_the_imported_module_is_raised_unchanged(file):
    file.write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        open_config(QUICKSTART, [f"train.imports=['{file}']"])


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="has the name of another module"):
        open_config(QUICKSTART, [f"train.imports=['{tmp_path / 'json.py'}']"])


def test_code_that_a_zoo_entry_names_is_not_run_unless_the_user_names_it(file, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    cfg = LazyConfig.apply_overrides(load_config(QUICKSTART), [f"train.imports=['{file}']"])
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    publish_tiny(tmp_path / "zoo", config=(tmp_path / "config.yaml").read_text())
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    assert open_config("zoo:tiny").train.imports is None
    assert "left to you" in caplog.text and "train.imports" in caplog.text
    assert file.stem not in PRETEXT_METHODS
    open_config("zoo:tiny", [f"train.imports=['{file}']"])
    assert file.stem in PRETEXT_METHODS


def voc_det(*overrides):
    return LazyConfig.apply_overrides(load_config("bissl/voc_det.py"), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["bilevel.adaptation={every: 100, alpha: 0.1}"],
        ["clip_grad.lower=null", "clip_grad.finetune=5.0", "finetune.epochs=0.5"],
        ["finetune.epochs=null", "finetune.steps=3"],
        ["+my_section={a: 1}"],
        ["train.amp=bf16", "bilevel.hvp_mode=recompute"],
    ],
)
def test_valid_variations_are_accepted(overrides):
    check_config(voc_det(*overrides), "test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+bilevel.lamda=1", "no key 'bilevel.lamda'. Did you mean 'lambda'"),
        ("~train.checkpoint.keep", "'train.checkpoint.keep' is missing"),
        ("~optimizer", "section 'optimizer' is missing"),
        ("train.seed=true", "train.seed is True; it must be a whole number"),
        ("finetune.baseline=1", "finetune.baseline is 1; it must be true or false"),
        ("train.checkpoint={period: 2}", "'train.checkpoint.keep' is missing"),
        ("train.log_period=0", "train.log_period is 0; it must be a whole number, 1 or more"),
        ("bilevel.lambda=0", "bilevel.lambda is 0"),
        ("train.seed=1180591620717411303424", "from 0 to 2^32 - 1"),
        ("clip_grad.lower=0", "clip_grad.lower is 0; it must be null, or a number above 0"),
        ("clip_grad.finetune=-1", "clip_grad.finetune is -1"),
        ("bilevel.adaptation=often", "bilevel.adaptation is 'often'"),
        ("bilevel.adaptation={evry: 3}", "no key 'bilevel.adaptation.evry'. Did you mean 'every'"),
        ("train.stages=[finetnue]", "train.stages has 'finetnue'. Did you mean 'finetune'"),
        ("train.stages=[finetune,pretrain]", "each once, in order"),
        ("train.stages=[pretrain,pretrain]", "each once, in order"),
        ("train.stages=[]", "each once, in order"),
        ("train.stages=bissl", "'train.stages' is a list"),
        ("train.amp=fp16", "train.amp is 'fp16'; it must be null or 'bf16'"),
        ("bilevel.on_bad_hypergradient=skip", "on_bad_hypergradient is 'skip'; it must be 'stop' or 'plain'"),
        ("bilevel.hvp_mode=null", "bilevel.hvp_mode is None; it must be text, such as 'retain_graph'"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(override, message):
    with pytest.raises(ConfigError) as error:
        check_config(voc_det(override), "mine.py")
    assert message in str(error.value)
