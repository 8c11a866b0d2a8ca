"""The shipped configs of the pretext methods say what the methods do by default."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.config import LazyConfig, config_root, instantiate
from bissl_zoo.registry import PRETEXT_METHODS, build_backbone, build_pretext

CONFIGS = sorted((config_root() / "common" / "pretext").glob("*.py"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def section(request):
    section = LazyConfig.load(request.param).pretext
    assert section.name == request.param.stem
    return section


def defaults_of(name):
    parameters = inspect.signature(PRETEXT_METHODS.get(name)).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def test_every_method_has_a_config():
    assert {path.stem for path in CONFIGS} == set(PRETEXT_METHODS.list())


def test_numbers_are_the_methods_defaults(section):
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults_of(section.name).items()}
    given = {key: value for key, value in section.items() if not key.startswith("_") and key != "name"}
    assert given.keys() == defaults.keys()
    del given["augmentation"], defaults["augmentation"]
    assert given == defaults


def test_views_are_the_methods_defaults(section):
    # a backbone that every method takes
    trunk, tail = build_backbone(name="test_vit", class_token=False, global_pool="avg").split("blocks.5")
    method = build_pretext(name=section.name, backbone=trunk, tail=tail, **narrow_widths({"name": section.name}))
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    samples = []
    for views in (instantiate(section.augmentation), method.views()):
        torch.manual_seed(0)
        samples.append([view for _ in range(5) for view in views(Image.fromarray(pixels))])
    assert all(torch.equal(one, other) for one, other in zip(*samples, strict=True))
