"""Every argument of every part has a domain, and the values of the shipped configs are in it."""

import inspect

import pytest
from omegaconf import OmegaConf

from bissl_zoo import registry
from bissl_zoo.config import config_root, load_config, locate
from bissl_zoo.config.arguments import CALLS, PARTS, USER_ARGS, argument_problems

SHIPPED = sorted(
    path.relative_to(config_root()).as_posix()
    for folder in ("bissl", "bissl_v2", "pretrain", "quickstart")
    for path in (config_root() / folder).glob("*.py")
)
#: what the framework passes itself
PASSED = {"backbone", "tail"}
PASSED_TO_LOADERS = {"transform", "collate", "seed", "start_step"}


SHIPPED_PARTS = [(target, name) for target, (kind, _) in PARTS.items() for name in getattr(registry, kind).list()]
SHIPPED_PARTS = [part for part in SHIPPED_PARTS if "backbone" not in part[0] or part[1] in ("timm", "resnet18")]


@pytest.mark.parametrize("target, name", SHIPPED_PARTS, ids=[name for _, name in SHIPPED_PARTS])
def test_every_argument_of_every_part_is_declared(target, name):
    kind, domains = PARTS[target]
    parts = getattr(registry, kind)
    parameters = inspect.signature(parts.get(name)).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - PASSED
    if target.endswith("task"):
        named -= {"classes"}
    declared = {*domains, *parts.arguments(name), *USER_ARGS.get(target, ())}
    assert named <= declared, f"give the domains of {named - declared} in bissl_zoo/config/arguments.py"
    defaults = {p.name: p.default for p in parameters if p.name in domains and p.default is not p.empty}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    optional = {key: value for key, value in plain.items() if value is not None and value != []}
    assert {key: domains[key].problem(value) for key, value in optional.items() if domains[key].problem(value)} == {}


def test_no_listed_argument_is_one_that_only_the_user_gives():
    for target, names in USER_ARGS.items():
        assert not set(names) & set(PARTS[target][1])


@pytest.mark.parametrize("target", [target for target in CALLS if target.startswith("bissl_zoo.")])
def test_every_argument_of_every_call_is_declared(target):
    named = set(inspect.signature(locate(target)).parameters) - PASSED_TO_LOADERS
    assert named <= set(CALLS[target])


OPTIMIZERS = [target for target in CALLS if ".optim." in target and not target.startswith("bissl_zoo.")]


@pytest.mark.parametrize("target", [target for target in CALLS if target.startswith("fvcore.")])
def test_listed_schedules_exist_and_take_the_listed_arguments(target):
    assert set(CALLS[target]) == set(inspect.signature(locate(target)).parameters)


def test_listed_arguments_of_optimizers_are_those_of_some_optimizer_and_none_is_code():
    taken = set().union(*(inspect.signature(locate(target)).parameters for target in OPTIMIZERS))
    listed = set().union(*(CALLS[target] for target in OPTIMIZERS))
    assert listed <= taken and "params" not in listed


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.startswith("quickstart") else pytest.mark.slow) for n in SHIPPED]
)
def test_arguments_of_shipped_configs_are_in_their_domains(name):
    assert argument_problems(OmegaConf.to_container(load_config(name), resolve=True)) == []


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("dataloader.pretext.batch_size", 0, "whole number"),
        ("solver.damping", "atuo", "auto"),
        ("task.nms_threshold", 1.5, "from 0 to 1"),
    ],
)
def test_a_value_outside_its_domain_is_reported_with_its_key(path, value, words):
    cfg = load_config("quickstart/digit_scenes_det.py")
    OmegaConf.update(cfg, path, value)
    (problem,) = argument_problems(OmegaConf.to_container(cfg, resolve=True))
    assert problem.startswith(f"{path} is {value!r}; it must be ") and words in problem
