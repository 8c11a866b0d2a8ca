"""The checks of a config before a run."""

import pytest

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.checks import check_config
from bissl_zoo.errors import ConfigError


def voc_det(*overrides):
    return LazyConfig.apply_overrides(load_config("bissl/voc_det.py"), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["bilevel.adaptation={every: 100, alpha: 0.1}"],
        ["bilevel.lambda=1", "bilevel.gamma=0"],
        ["clip_grad.lower=null", "clip_grad.finetune=5.0"],
        ["finetune.epochs=0.5"],
        ["finetune.epochs=null", "finetune.steps=3"],
        ["+my_section={a: 1}"],
        ["train.amp=bf16", "bilevel.hvp_mode=recompute"],
        ["train.amp=null"],
    ],
)
def test_valid_variations_are_accepted(overrides):
    check_config(voc_det(*overrides), "test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+bilevel.lamda=1", "no key 'bilevel.lamda'. Did you mean 'lambda'"),
        ("+bilevel.head_warmup.step=1", "no key 'bilevel.head_warmup.step'. Did you mean 'head_warmup.steps'"),
        ("~train.checkpoint.keep", "'train.checkpoint.keep' is missing"),
        ("~optimizer", "section 'optimizer' is missing"),
        ("train.seed=1.5", "train.seed is 1.5; it must be a whole number"),
        ("train.seed=true", "train.seed is True; it must be a whole number"),
        ("finetune.baseline=1", "finetune.baseline is 1; it must be true or false"),
        ("train.checkpoint={period: 2}", "'train.checkpoint.keep' is missing"),
        ("train.stages=bissl", "'train.stages' is a list"),
        ("bilevel.curvature_batch_size=1", "must be 2 or more"),
        ("train.amp=fp16", "train.amp is 'fp16'; accepted are null and bf16. Did you mean 'bf16'?"),
        ("train.amp=true", "train.amp is 'True'; accepted are null and bf16."),
        ("bilevel.hvp_mode=recomputed", "bilevel.hvp_mode is 'recomputed'; accepted are"),
        ("bilevel.hvp_mode=null", "bilevel.hvp_mode is None; it must be text, such as 'retain_graph'"),
        ("bilevel.head_warmup.backbone_mode=evl", "accepted are eval and train. Did you mean 'eval'?"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(override, message):
    with pytest.raises(ConfigError) as error:
        check_config(voc_det(override), "mine.py")
    assert message in str(error.value)
