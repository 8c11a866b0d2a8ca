import builtins
import math
import os
import pstats
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig, instantiate
from bissl_zoo.errors import ConfigError

HEADER = "from torch import nn\nimport torch\nfrom bissl_zoo.config import LazyCall as L\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(name: str, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        LazyConfig.load(write(name, text))
    return str(error.value)


def test_sections_are_the_public_dictionaries_and_lists():
    path = write(
        "a.py",
        HEADER + "width = 8\n_hidden = {(1, 2): 3}\ntrain = dict(seed=0, size=(1, 2))\nstages = ['pretrain']\n"
        "head = L(nn.Linear)(in_features=width, out_features='${train.seed}')\n"
        "def helper():\n    import math\n    return math.pi\ntrain['pi'] = helper()\n",
    )
    cfg = LazyConfig.load(path)
    assert set(cfg) == {"train", "stages", "head"}
    assert cfg.train == {"seed": 0, "size": [1, 2], "pi": math.pi}
    assert OmegaConf.to_container(cfg.head, resolve=False)["out_features"] == "${train.seed}"
    assert cfg.head.out_features == 0


def test_relative_imports_follow_folders_and_give_copies():
    write("common/train.py", "train = dict(seed=0, log=dict(every=10))\n")
    write("common/data/sets.py", "from ..train import train\nimages = dict(root='x')\n_size = 3\n")
    write("bissl/base.py", "from ..common.train import train\ntrain.seed = 1\ntrain.log.every = 5\nmodel = dict(a=1)\n")
    path = write(
        "bissl/voc.py",
        "from ..common import train as t\nfrom . import base\nfrom .base import model, train\n"
        "from ..common.train import train as fresh\nfrom ..common.data.sets import *\n"
        "from ..common.data.sets import _size\n"
        "model.a = 2\nseen = dict(base=base.model.a, common=t.train.seed, edited=base.train.seed, size=_size)\n",
    )
    cfg = LazyConfig.load(path)
    assert cfg.seen == {"base": 1, "common": 0, "edited": 1, "size": 3}
    assert cfg.model.a == 2 and cfg.fresh.seed == 0 and cfg.fresh.log.every == 10 and cfg.images.root == "x"
    assert cfg.train.seed == 0  # the star import comes last and rebinds it
    assert LazyConfig.load("bissl/base.py").model.a == 1


def test_the_import_of_the_process_is_never_replaced():
    original = builtins.__import__
    write("x.py", "import builtins\nseen = dict(same=builtins.__import__ is __import__, id=id(builtins.__import__))\n")
    cfg = LazyConfig.load(write("a.py", "from .x import seen\n"))
    assert cfg.seen.same is False and cfg.seen.id == id(original)
    refusal("b.py", "from .x import seen\nraise ValueError('stop')\n")
    assert builtins.__import__ is original


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = = 2\n", "a.py:2: invalid syntax: b = = 2"),
        ("a = {}\nfrom .tain import train\n", "a.py:2: relative import of a file that does not exist: tain.py."),
        ("from .train import trian\n", "a.py:1: train.py has no 'trian'. Did you mean 'train'?"),
        ("\nfrom .broken import x\n", "broken.py:3: ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all\n", "a.py:1: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        (HEADER + "def f(): pass\nx = L(f)()\n", "a.py:5: <function f"),
        (HEADER + "x = L(nn.Linear)(3)\n", "a.py:4: L(torch.nn.modules.linear.Linear)(...) takes keyword arguments"),
        ("x = dict(a='${')\n", "a.py: "),
        ("from . import a\n", "a.py:1: circular import of configs: a.py -> a.py"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_file_and_line(text, expected):
    write("train.py", "train = dict(seed=0)\n")
    write("broken.py", "a = 1\n\nx = dict(y=1 / 0)\n")
    message = refusal("a.py", text)
    assert message.startswith(expected)
    assert "tain" not in text or "Did you mean 'train.py'?" in message


@pytest.mark.parametrize(
    ("text", "key", "kind"),
    [
        (
            "task = dict(a=[0, L(nn.Sequential)(head=nn.Linear(1, 1))])",
            "task.a.1.head",
            "torch.nn.modules.linear.Linear",
        ),
        ("import pathlib\ntrain = dict(out=pathlib.PurePosixPath('runs'))", "train.out", "PurePosixPath"),
    ],
)
def test_a_live_object_is_refused_with_file_and_key(text, key, kind):
    message = refusal("a.py", HEADER + text + "\n")
    assert message.startswith(f"a.py: '{key}' is a live object of ") and kind in message and "L(" in message


def test_classes_as_values_and_callable_targets_become_names():
    text = HEADER + "from omegaconf import DictConfig\nallow = dict(allow_objects=True)\n"
    text += "mine = L(nn.Sequential)(norm=nn.BatchNorm2d, act=[torch.nn.functional.relu])\n"
    text += "theirs = DictConfig({'_target_': nn.Linear, 'in_features': 1, 'out_features': 2}, flags=allow)\n"
    cfg = LazyConfig.load(write("a.py", text))
    named = {"_target_": "bissl_zoo.config.locate", "name": "torch.nn.modules.batchnorm.BatchNorm2d"}
    assert cfg.mine.norm == named
    assert cfg.theirs == L(nn.Linear)(in_features=1, out_features=2)
    assert instantiate(cfg.mine.norm) is nn.BatchNorm2d and instantiate(cfg.mine.act)[0] is nn.functional.relu
    assert instantiate(cfg.theirs).weight.shape == (2, 1)


def test_named_tuples_data_classes_partials_and_objects_without_attributes_become_calls():
    text = HEADER + "import functools, pstats, urllib.parse\nfrom torchvision.transforms import ToTensor\n"
    text += "call = L(nn.Sequential)(shape=pstats.FunctionProfile('3', 1.0, 0.5, 2.0, 0.1, 'x.py', 7))\n"
    text += "live = dict(url=urllib.parse.urlsplit('https://a/b'), image=ToTensor())\n"
    text += "live.update(norm=functools.partial(nn.BatchNorm2d, 3, eps=1e-3))\n"
    cfg = LazyConfig.load(write("a.py", text))
    LazyConfig.save(cfg, "a.yaml")
    assert LazyConfig.load("a.yaml") == cfg
    assert cfg.call.shape == {"_target_": "pstats.FunctionProfile"} | vars(
        pstats.FunctionProfile("3", 1.0, 0.5, 2.0, 0.1, "x.py", 7)
    )
    cfg.live.norm["keywords"].eps = 0.5  # an override
    live = instantiate(cfg.live)
    assert live["url"].geturl() == "https://a/b" and type(live["image"]).__name__ == "ToTensor"
    assert live["norm"]().eps == 0.5 and live["norm"]().num_features == 3
    assert instantiate(cfg.call.shape).line_number == 7


def test_objects_of_classes_that_a_config_defines_are_refused():
    text = "import dataclasses\n@dataclasses.dataclass\nclass S:\n    a: int = 1\nt = dict(s=S())\n"
    message = refusal("a.py", text)
    assert message.startswith("a.py: 't.s': <class") and "cannot be imported by a name" in message


@pytest.mark.parametrize("key", ["None", "True", "1.5", "b'x'"])
def test_keys_are_text_or_whole_numbers(key):
    assert "a.py" in refusal("a.py", f"t = dict(s={{{key}: 1}})\n")


def test_load_needs_an_existing_file_of_a_known_kind():
    for name, problem in (("no.py", "No such file"), ("no.yaml", "No such file"), ("no.json", "ends in .py, .yaml or")):
        with pytest.raises(ConfigError, match=f"{name}: .*{problem}"):
            LazyConfig.load(name)


HARD = {
    "floats": [1e-3, 1e20, -0.0, 1e-300, math.inf, -math.inf, 3.0, 0.1 + 0.2],
    "text": ["", " x ", *"1e-3 1e5 on Off null ~ 007 0x1F 12:30:45 2024-01-31 .5 1_000 .nan = << #x !tag %".split()],
    "more": ["- a", "a: b", "two\nlines\n", "tab\t", "ünïcode 猫 🐈", "\x85\u2028", "'\""],
    "none": None,
    "bools": [True, False],
    "ints": [0, -7, 10**30],
    "nested": [[1, [2, []]], {"a": [{}]}],
    "empty": {},
    "7": "text key",
    8: "number key",
    "007": 1,
    "on": 2,
    "a b": 3,
    "refers": "${ints.1}",
    "escaped": r"\${ints.1}",
    "missing": "???",
}


def test_what_is_saved_loads_equal_on_hard_values():
    cfg = OmegaConf.create(HARD)
    LazyConfig.save(cfg, "c.yaml")
    again = LazyConfig.load("c.yaml")
    assert OmegaConf.to_container(again, resolve=False) == HARD
    assert repr(OmegaConf.to_container(again, resolve=False)) == repr(HARD)  # tells 1 from True and 0.0 from -0.0
    assert again.refers == -7
    LazyConfig.save(again, "d.yaml")
    assert Path("c.yaml").read_bytes() == Path("d.yaml").read_bytes()
    LazyConfig.save(OmegaConf.create({"a": float("nan")}), "c.yaml")
    assert math.isnan(LazyConfig.load("c.yaml").a)
    LazyConfig.save(OmegaConf.create(), "c.yaml")
    assert LazyConfig.load("c.yaml") == {}


text = st.text(st.characters(exclude_characters="$"), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
numeric = st.from_regex(r"[-+]?[0-9_.:]{0,4}([eExX][-+]?[0-9a-f]{0,2})?", fullmatch=True)
trees = st.recursive(
    scalars | numeric,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | numeric | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(text | numeric, trees, max_size=3))
def test_any_plain_config_survives_saving(plain):
    cfg = OmegaConf.create(plain)
    LazyConfig.save(cfg, "h.yaml")
    expected, loaded = (OmegaConf.to_container(c, resolve=False) for c in (cfg, LazyConfig.load("h.yaml")))
    assert repr(loaded) == repr(expected)


def test_a_saved_config_reads_the_same_in_stock_yaml_and_runs_no_code():
    write("side_effect.py", "raise SystemExit('was imported')\n")
    cfg = LazyConfig.load(write("a.py", "t = {'_target_': 'side_effect.X', 'y': ['on', '1_0', '12:30', 7, 1.5]}\n"))
    LazyConfig.save(cfg, "c.yaml")
    assert yaml.safe_load(Path("c.yaml").read_text()) == {"t": {"_target_": "side_effect.X", "y": cfg.t.y}}
    os.remove("a.py")
    assert LazyConfig.load("c.yaml") == cfg


def test_yaml_values_are_read_without_surprises():
    cfg = LazyConfig.load(
        write("a.yaml", "a: [1e-3, 1E5, .5, -1., 2024-01-31, 007, 12:30, 0x1F, 1_000, true, off, ~]\nb:\n")
    )
    assert cfg.a == [1e-3, 1e5, 0.5, -1.0, "2024-01-31", "007", "12:30", 31, 1000, True, False, None]
    assert cfg.b is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: !!python/object/apply:os.system ['touch pwned']\n", "a.yaml:2: not valid YAML: the tag"),
        ("a: 1\n\nb: !mine {x: 1}\n", "a.yaml:3: not valid YAML: the tag !mine is refused"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "a.yaml:2: not valid YAML: the key 'c' is given twice"),
        ("a: &x [1]\nb: *x\n", "a.yaml:1: not valid YAML: anchors and aliases are refused"),
        ("a: [1\n", "a.yaml:2: not valid YAML: expected ',' or ']'"),
        ("? [1, 2]\n: 3\n", "a.yaml:1: not valid YAML: found unhashable key"),
        ("a: {on: 1}\n", "a.yaml: in 'a.True' the key True is a bool; quote it"),
        ("a: '${'\n", "a.yaml: 'a': "),
        ("a: " + "[" * 3000, "a.yaml:1: not valid YAML: nested more than 64 levels"),
        ("a: " + "9" * 5000, "a.yaml: not valid YAML: Exceeds the limit"),
        ("a: \x01\n", "a.yaml: not valid YAML: "),
        ("", "a.yaml: a config is a mapping of sections, not NoneType."),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused_with_the_line(text, expected):
    if "Exceeds" in expected and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python has no limit on the digits of a number")
    assert refusal("a.yaml", text).startswith(expected)
    assert not Path("pwned").exists()


def test_saving_is_atomic_and_refuses_live_objects():
    LazyConfig.save(OmegaConf.create({"a": 1}), "c.yaml")
    live = DictConfig({"a": {"m": nn.ReLU()}}, flags={"allow_objects": True})
    with pytest.raises(ConfigError, match="c.yaml: 'a.m' is a live object"):
        LazyConfig.save(live, "c.yaml")
    with pytest.raises(ConfigError, match="c.yaml/c.yaml: cannot write the config"):
        LazyConfig.save(OmegaConf.create({"a": 2}), "c.yaml/c.yaml")
    with pytest.raises(ConfigError, match="ends in .yaml"):
        LazyConfig.save(OmegaConf.create({"a": 2}), "c.py")
    Path("folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="folder.yaml: cannot write"):
        LazyConfig.save(OmegaConf.create({"a": 2}), "folder.yaml")
    assert LazyConfig.load("c.yaml") == {"a": 1}
    assert sorted(os.listdir()) == ["c.yaml", "folder.yaml"]
