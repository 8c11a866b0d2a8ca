from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, config_root, files, load_config, with_defaults
from bissl_zoo.errors import ConfigError

BASE = {
    "solver": {"_target_": "m.cg", "iterations": 5, "damping": 10.0},
    "train": {"stages": ["pretrain", "bissl"], "out": "runs", "hooks": [{"every": 1}], "empty": {}, 7: "a"},
    "backbone": {"name": "resnet18"},
    "task": {"backbone": "${backbone}"},
}


def override(*overrides: str) -> DictConfig:
    return LazyConfig.apply_overrides(OmegaConf.create(BASE), overrides, source="configs/voc.py")


def test_overrides_change_add_and_remove_without_touching_the_input():
    base = OmegaConf.create(BASE)
    overrides = [
        "solver.iterations=10",
        "+solver.blockwise=true",
        "~train.out",
        "train.hooks.0.every=2",
        "solver._target_=m.x",
    ]
    cfg = LazyConfig.apply_overrides(base, overrides)
    assert base == BASE
    assert cfg.solver == {"_target_": "m.x", "iterations": 10, "damping": 10.0, "blockwise": True}
    assert "out" not in cfg.train and cfg.train.hooks == [{"every": 2}]
    assert cfg.task.backbone.name == "resnet18"
    assert override("+train.stages.2=finetune", "~train.stages.0").train.stages == ["bissl", "finetune"]
    assert override("train.7=b").train[7] == "b"
    assert override("+new={a: 1}", "+new.b=2").new == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("'1e-3'", "1e-3"),
        ("a=b", "a=b"),
        ("", None),
        ("''", ""),
        ("[1, [x, 2.5]]", [1, ["x", 2.5]]),
        ("{a: {b: off}}", {"a": {"b": False}}),
        ("${backbone.name}", "resnet18"),
    ],
)
def test_override_values_are_yaml(text, value):
    cfg = override(f"train.out={text}")
    assert cfg.train.out == value and type(OmegaConf.to_container(cfg, resolve=True)["train"]["out"]) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("every=1", "Nearest: train.hooks.0.every. Use +every=1"),
        ("train.out.x=1", "no key 'train.out.x'"),
        ("train.stages.2=x", "no key 'train.stages.2'"),
        ("~solver.iteration", "no key 'solver.iteration' (override '~solver.iteration'). Nearest: solver.iterations."),
        ("task.backbone.name=x", "'task.backbone' is ${backbone}; override the key it refers to."),
        ("+solver.damping=1", "already exists (override '+solver.damping=1'). Use solver.damping=1"),
        ("+train.ema.decay=1", "no section 'train.ema' to add to"),
        ("+train.stages.5=x", "has 2 entries (override '+train.stages.5=x'). Number 2 appends."),
        ("solver=cg", "'solver' is a section, not a value (override 'solver=cg'). Set one of _target_, iter"),
        ("train.stages=bissl", "'train.stages' is a list (override 'train.stages=bissl'). Use train.stages=[bissl]"),
        ("solver.damping", "Write key.sub=value to change"),
        ("solver..damping=3", "Write key.sub=value to change"),
        ("~solver=3", "Write key.sub=value to change"),
        ("train.out=[1", "configs/voc.py: override 'train.out=[1': not valid YAML"),
        ("train.out=!!python/name:os.system", "the tag"),
        ("train.out={1.5: 2}", "in 'train.out.1.5' the key 1.5 is a float"),
        ("train.out='${'", "'train.out': "),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(text, expected):
    with pytest.raises(ConfigError) as error:
        override(text)
    message = str(error.value)
    assert message.startswith("configs/voc.py: ") and expected in message


def test_a_section_is_replaced_by_a_mapping_an_interpolation_or_in_two_steps():
    assert override("solver={name: x}").solver == {"name": "x"}
    assert override("solver=${backbone}").solver == {"name": "resnet18"}
    assert override("~solver", "+solver=cg").solver == "cg"
    assert override("train.stages=null").train.stages is None
    assert override("train.empty=1", "train.out={a: 1}").train.out == {"a": 1}


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_load_config_takes_paths_and_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site" / "bissl_zoo"
    write("site/configs/bissl/voc_det.py", "from ..common.train import train\n")
    write("site/configs/common/train.py", "train = dict(seed=3)\n")
    package.mkdir()
    monkeypatch.setattr(files, "__file__", str(package / "config" / "files.py"))
    assert config_root() == tmp_path / "site" / "configs"
    assert load_config("bissl/voc_det.py").train.seed == load_config("configs/bissl/voc_det.py").train.seed == 3
    write("own.py", "train = dict(seed=4)\n")
    assert load_config("own.py").train.seed == load_config(tmp_path / "own.py").train.seed == 4
    with pytest.raises(ConfigError, match="no config 'bissl/voc_dte.py'. Nearest: bissl/voc_det.py. The 1 shipped"):
        load_config("bissl/voc_dte.py")
    write("mine.py", "from bissl_zoo.configs.bissl.voc_det import *\ntrain.seed += 3\n")
    write("other.py", "from bissl_zoo.configs.bissl import voc_det\ntrain = voc_det.train\n")
    assert load_config("mine.py").train.seed == 6 and load_config("other.py").train.seed == 3
    for file, line in {"mine.py": "bissl.voc_dte import *", "other.py": "bissl import voc_dte"}.items():
        write(file, f"from bissl_zoo.configs.{line}\n")
        with pytest.raises(ConfigError, match=f"{file}:1: .*Nearest: bissl/voc_det.py"):
            load_config(file)
    write("mine.py", "from .configs.bissl.voc_det import *\n")
    with pytest.raises(ConfigError, match="imported from bissl_zoo.configs"):
        load_config("mine.py")
    write("site/bissl_zoo/configs/installed.py", "train = dict(seed=5)\n")  # a wheel carries them inside the package
    assert load_config("installed.py").train.seed == 5


def test_the_error_of_a_wrong_config_name_names_the_few_nearest_and_the_folder():
    with pytest.raises(ConfigError) as error:
        load_config("runs/food101_simclr")
    message = str(error.value)
    assert "Nearest: bissl/food101_simclr.py" in message and message.endswith(f"configs are in {config_root()}.")
    assert message.count(".py") <= 5 and "pretrain/" not in message


def test_a_number_that_no_list_has_is_no_key():
    for number in ("9" * 20, "9" * 5000):  # Python refuses to read more than 4,300 digits
        with pytest.raises(ConfigError, match="no key 'train.hooks.999"):
            override(f"train.hooks.{number}=1")


def test_a_yaml_config_above_the_size_limit_is_not_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {seed: 0}\n")
    with open(path, "r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(ConfigError, match="the limit is 1,048,576"):
        LazyConfig.load(path)


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ("{a: ", "}")])
def test_nesting_has_an_end(tmp_path, opened, closed):
    path = tmp_path / "config.yaml"
    path.write_text(f"a: {opened * 30}1{closed * 30}\n")
    assert override(f"+train.deep={opened * 30}1{closed * 30}").train.deep == LazyConfig.load(path).a
    for depth in (70, 150):
        path.write_text(f"a: {opened * depth}{closed * depth}\n")
        with pytest.raises(ConfigError, match="config.yaml:1: .*nested more than 64 levels"):
            LazyConfig.load(path)
        with pytest.raises(ConfigError, match="nested more than 64 levels"):
            override(f"train.out={opened * depth}{closed * depth}")


def test_keys_of_earlier_versions_are_read_under_their_new_names():
    old = OmegaConf.create(
        {
            "bilevel": {"products": "rebuild", "move_statistics": False},
            "finetune": {"frozen_stage": "c2"},
            "dataloader": {"pretext": {"views_on": "device"}},
        }
    )
    cfg = with_defaults(old)
    assert (cfg.bilevel.hvp_mode, cfg.bilevel.update_bn_stats) == ("recompute", False)
    assert (cfg.finetune.freeze_at, cfg.dataloader.pretext.augment_on) == ("c2", "device")
    assert "products" not in cfg.bilevel and "views_on" not in cfg.dataloader.pretext
    assert old.bilevel.products == "rebuild"
