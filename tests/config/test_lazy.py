import collections
import functools
import itertools

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig, instantiate, locate
from bissl_zoo.errors import ConfigError, RegistryError
from bissl_zoo.registry import build_solver


def test_a_lazy_call_stores_an_importable_name_at_once():
    call = L(nn.BatchNorm2d)(num_features=4)
    assert isinstance(call, DictConfig)
    assert call == {"_target_": "torch.nn.modules.batchnorm.BatchNorm2d", "num_features": 4}
    assert locate(call._target_) is nn.BatchNorm2d
    assert L("torch.nn.Linear")(in_features=1)._target_ == "torch.nn.Linear"


def test_classmethods_keep_the_class_they_were_taken_from():
    assert L(nn.Embedding.from_pretrained)()._target_ == "torch.nn.modules.sparse.Embedding.from_pretrained"
    assert instantiate(L(nn.EmbeddingBag.from_pretrained)(embeddings=torch.zeros(2, 3))).embedding_dim == 3
    with pytest.raises(ConfigError, match=r"L\('package.module.name'\)"):
        L(collections.OrderedDict.fromkeys)  # written in C, and does not say where it belongs


def _local():
    def inner() -> None:
        pass

    return inner


@pytest.mark.parametrize("target", [lambda: 0, _local(), functools.partial(print), nn.Linear(1, 1), 5])
def test_what_cannot_be_imported_again_is_refused(target):
    with pytest.raises(ConfigError, match="top level of an importable module"):
        L(target)


def test_objects_of_main_and_impostors_are_refused(monkeypatch):
    impostor = type("Linear", (), {"__module__": "torch.nn"})
    with pytest.raises(ConfigError, match="cannot be imported by a name"):
        L(impostor)
    import __main__

    monkeypatch.setattr(__main__, "Mine", type("Mine", (), {"__module__": "__main__"}), raising=False)
    with pytest.raises(ConfigError, match="importable module"):
        L(__main__.Mine)


def test_positional_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"L\(torch.nn.modules.linear.Linear\).*keyword arguments only"):
        L(nn.Linear)(1, 2)


def test_instantiate_builds_children_first_and_leaves_no_omegaconf_types():
    cfg = L(nn.Sequential)()
    assert isinstance(instantiate(cfg), nn.Sequential)
    cfg = L(nn.ModuleDict)(modules={"a": L(nn.Linear)(in_features=2, out_features=3), "b": L(nn.ReLU)()})
    built = instantiate(cfg)
    assert [type(module) for module in built.values()] == [nn.Linear, nn.ReLU]
    assert built["a"].weight.shape == (3, 2)
    plain = instantiate(OmegaConf.create({"x": [1, {"y": "${z}"}], "z": (2, 3), "call": L(dict)(k=[4])}))
    assert plain == {"x": [1, {"y": [2, 3]}], "z": [2, 3], "call": {"k": [4]}}
    assert type(plain) is dict and type(plain["x"]) is list and type(plain["call"]["k"]) is list
    assert instantiate({"deep": [L(dict)(a=1)]}) == {"deep": [{"a": 1}]}
    assert instantiate(None) is None


def test_extra_arguments_go_to_the_outermost_call_by_identity():
    module = nn.Linear(2, 2)
    cfg = L(dict)(inner=L(dict)(a=1), model=L("no.such.module")())
    built = instantiate(cfg, model=module, cfg=5)
    assert built["model"] is module
    assert built == {"inner": {"a": 1}, "model": module, "cfg": 5}
    optimizer = instantiate(L(torch.optim.SGD)(lr=0.5), params=module.parameters())
    assert optimizer.param_groups[0]["params"][0] is module.weight
    with pytest.raises(ConfigError, match="no _target_.* model"):
        instantiate(OmegaConf.create({"a": 1}), model=module)


def test_interpolations_resolve_from_a_section_up_to_the_root():
    cfg = OmegaConf.create({"width": 7, "task": L(nn.Linear)(in_features="${width}", out_features="${.in_features}")})
    assert instantiate(cfg.task).weight.shape == (7, 7)
    cfg.task.in_features = "${widht}"
    with pytest.raises(ConfigError, match="'task.in_features'.*widht"):
        instantiate(cfg.task)
    cfg.task.in_features = "???"
    with pytest.raises(ConfigError, match="task.in_features"):
        instantiate(cfg.task)


def test_a_config_as_target_is_built_and_called():
    maker = L(functools.partial)
    assert maker(x=1)._target_ == "functools.partial"
    getter = L(L(locate)(name="itertools.count"))(start=5)
    assert next(instantiate(getter)) == 5
    assert next(instantiate(OmegaConf.create({"a": getter}).a)) == 5


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("torch.nn.Linaer", r"'task.head': .*'nn' has no 'Linaer'. Did you mean 'Linear'\?"),
        ("torhc.nn.Linear", "no module is called 'torhc'"),
        ("Linear", "'Linear' is not a dotted name"),
        ("math.pi", "the _target_ 'math.pi' cannot be called: its type is float"),
        (5, "the _target_ 5 cannot be called"),
    ],
)
def test_a_target_that_cannot_be_used_is_named_with_its_key(target, problem):
    cfg = OmegaConf.create({"task": {"head": {"_target_": target}}})
    with pytest.raises(ConfigError, match=problem):
        instantiate(cfg.task)


def test_a_module_that_fails_to_import_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_absent.py").write_text("import absent_dependency_of_mine\nclass Thing: pass\n")
    (tmp_path / "breaks.py").write_text("raise ValueError('on purpose')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs_absent failed: .*absent_dependency_of_mine"):
        locate("needs_absent.Thing")
    with pytest.raises(ConfigError, match="breaks failed: ValueError: on purpose") as error:
        instantiate(L("breaks.Thing")())
    assert isinstance(error.value.__cause__, ValueError)


def test_locate_finds_modules_hidden_by_a_function_of_their_name(tmp_path, monkeypatch):
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "__init__.py").write_text("from .tool import tool\n")
    (tmp_path / "hiding" / "tool.py").write_text("def tool(): pass\nclass Other: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("hiding.tool.Other").__qualname__ == "Other"
    assert locate("itertools.count") is itertools.count


def test_wrong_and_missing_arguments_name_the_accepted_ones():
    cfg = OmegaConf.create({"head": L(nn.Linear)(in_feature=2, out_features=3)})
    with pytest.raises(ConfigError) as error:
        instantiate(cfg.head)
    message = str(error.value)
    assert message.startswith("'head': torch.nn.modules.linear.Linear does not take 'in_feature'.")
    assert "Did you mean 'in_features'?" in message
    assert "It accepts: in_features, out_features, bias, device, dtype." in message
    with pytest.raises(ConfigError, match="needs 'out_features'"):
        instantiate(L(nn.Linear)(in_features=2))


def test_errors_inside_the_called_function_pass_unchanged():
    with pytest.raises(TypeError, match="JSON object must be str"):
        instantiate(L("json.loads")(s=5))
    with pytest.raises(RegistryError, match="Unknown hypergradient solver 'no_such'"):
        instantiate(L(build_solver)(name="no_such"))


def test_to_py_shows_calls_as_code():
    cfg = OmegaConf.create(
        {
            "train": {"seed": 0, "amp": {"enabled": False}, "empty": {}},
            "pretext": L(build_solver)(name="cg", projector=[256, 256], other={"a": "b", "c": L(nn.ReLU)()}),
            "norm": {"_target_": "bissl_zoo.config.locate", "name": "torch.nn.BatchNorm2d"},
            "seeds": ["${train.seed}", 1],
            "made": L(L(locate)(name="itertools.count"))(start="x"),
        }
    )
    assert LazyConfig.to_py(cfg).splitlines() == [
        "train.seed = 0",
        "train.amp.enabled = False",
        "train.empty = {}",
        "pretext = build_solver(name='cg', projector=[256, 256], other={'a': 'b', 'c': ReLU()})",
        "norm = BatchNorm2d",
        "seeds = [0, 1]",
        "made = count(start='x')",
    ]
    cfg.seeds[0] = "${nowhere}"
    with pytest.raises(ConfigError, match=r"'seeds\[0\]'.*nowhere"):
        LazyConfig.to_py(cfg)
