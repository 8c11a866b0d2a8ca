"""`train.amp=bf16`: what is computed in bfloat16, and what is not."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bissl_zoo.downstream import FasterRCNN
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Bissl
from bissl_zoo.pretext import SimCLR
from bissl_zoo.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def computed_in(monkeypatch):
    """How often losses and predictions were computed, and in which type of autocast."""
    counts = Counter()

    def spy(owner, name):
        method = getattr(owner, name)

        def spied(*args):
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            counts[owner.__name__, name, dtype] += 1
            return method(*args)

        monkeypatch.setattr(owner, name, spied)

    for owner, name in ((SimCLR, "outputs"), (SimCLR, "after_step"), (FasterRCNN, "losses"), (FasterRCNN, "predict")):
        spy(owner, name)
    return counts


def dtypes(state):
    """Of all floating-point tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return {state.dtype} if state.is_floating_point() else set()
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return set().union(*map(dtypes, items))


def test_a_whole_run_in_bf16_leaves_float32_and_measures_in_it(
    tiny_config, at_scenes, tmp_path, computed_in, monkeypatch
):
    monkeypatch.setattr("bissl_zoo.engine.runner.preflight", lambda *_: None)  # which passes through every stage, too
    entry = run(tiny_config(train__amp="bf16", train__output_dir=tmp_path / "run"), "test")["entry"]
    assert computed_in == {
        ("SimCLR", "outputs", torch.bfloat16): 2 + 2 * 2,  # of pretraining and of two alternations
        ("SimCLR", "outputs", torch.float32): 2,  # the curvature of each alternation
        ("SimCLR", "after_step", torch.float32): 2 + 2 * 2,
        ("FasterRCNN", "losses", torch.bfloat16): 2 + 2 * 2 + 2 + 2,  # warm-up, v and plain, baseline, fine-tuning
        ("FasterRCNN", "predict", torch.float32): 2 * 2,
    }
    for path in (tmp_path / "run" / "checkpoints").glob("*/step_000002"):
        assert dtypes(load_checkpoint(path)[1]) == {torch.float32}
    files = list(Path(entry.location).glob("*.safetensors"))
    assert len(files) == 3 and all(dtypes(load_file(file)) == {torch.float32} for file in files)


@pytest.mark.parametrize("hvp_mode", ["retain_graph", "recompute"])
def test_hessian_products_do_not_feel_amp_and_the_lower_loss_does(tiny_config, at_scenes, hvp_mode):
    context = open_context(tiny_config(train__amp="bf16", bilevel__hvp_mode=hvp_mode), "test")
    problem = Bissl().build(context, Weights()).problem
    lower, batch = problem.lower, next(problem.lower.data_iterator)
    u = torch.randn(sum(p.numel() for p in lower.backbone_parameters), generator=torch.Generator().manual_seed(0))
    assert lower.amp_dtype == problem.upper.amp_dtype == torch.bfloat16
    results = {}
    for dtype in (torch.bfloat16, None):
        lower.amp_dtype = dtype
        operator = problem.curvature(batch).prepare()
        total, _ = lower.loss(lower.backbone, batch)
        results[dtype] = operator.hessian_product(u), total.item()
    product, loss = results[torch.bfloat16]
    assert torch.equal(product, results[None][0]) and product.any()
    # rounding to 8 bits in each of some ten layers
    assert 0 < abs(loss - results[None][1]) < 10 * 2**-8 * loss
