"""Counts against closed forms and published numbers, and the measurement of time and memory."""

import pytest
import torch
from torch import nn

from bissl_zoo.analysis.costs import Cost, Gauge, find_data, random_batch, random_context
from bissl_zoo.analysis.model import analyse, count_losses, count_macs, count_module, count_stages, report
from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.build import Weights, build_downstream, build_pretext, build_split_backbone

QUICKSTART = "quickstart/digit_scenes_det.py"
VOC = "bissl/voc_det.py"
CPU = torch.device("cpu")


def changed(config, *overrides):
    return LazyConfig.apply_overrides(load_config(config), overrides)


# ------------------------------------------------------------------------------------------------ counting


def test_the_macs_of_a_convolution_and_a_linear_layer_are_their_closed_forms_and_so_are_those_of_backward():
    layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))
    image = torch.zeros(1, 3, 16, 16)
    count = count_module(layers, image)
    convolution, linear = 8 * 8 * 8 * 3 * 5 * 5, 8 * 8 * 8 * 10
    assert count.macs == convolution + linear
    assert count.parameters == 8 * 3 * 5 * 5 + 8 * 8 * 8 * 10 + 10
    output = layers(image.requires_grad_())
    macs, _ = count_macs(output.sum().backward)
    assert macs[""] == 2 * (convolution + linear)  # the gradients in weights and inputs


def test_the_macs_of_attention_are_those_of_its_two_products():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x[..., :5, :], x[..., :5, :4])

    assert count_module(Attention(), torch.zeros(1, 2, 7, 6)).macs == 2 * 7 * 5 * (6 + 4)


@pytest.mark.slow
def test_resnet50_has_its_published_macs_and_parameters_at_224_pixels():
    stages, whole = count_stages(changed(VOC), torch.zeros(1, 3, 224, 224))
    assert whole.macs == pytest.approx(4.1e9, rel=0.01)  # He et al., arXiv 1512.03385
    assert whole.parameters == 25_557_032 - (2048 * 1000 + 1000)  # torchvision's without the classifier
    assert [stage.map for stage in stages[:5]] == [
        (64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)
    ]  # fmt: skip
    assert [stage.part for stage in stages] == ["shared"] * 4 + ["tail"] * 2


def test_stages_add_up_to_the_whole_and_so_do_trunk_and_tail():
    cfg, image = changed(VOC, "backbone.name=resnet18"), torch.zeros(1, 3, 64, 64)
    stages, whole = count_stages(cfg, image)
    trunk, tail = (part.eval() for part in build_split_backbone(cfg))
    halves = count_module(trunk, image), count_module(tail, trunk(image)["c4"])
    assert sum(stage.count.macs for stage in stages) == whole.macs == sum(half.macs for half in halves)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (trunk, tail)]
    for part, size in zip(("shared", "tail"), sizes, strict=True):
        assert sum(stage.count.parameters for stage in stages if stage.part == part) == size
    assert sum(sizes) == whole.parameters


def test_the_parts_of_a_loss_add_up_and_have_the_parameters_of_their_modules(tiny_config, at_scenes):
    cfg = tiny_config()
    context = random_context(cfg, find_data(cfg), CPU)
    losses = count_losses(context)
    for role, (trunk, head) in {
        "pretext": build_pretext(cfg, Weights(), CPU),
        "train": build_downstream(context, Weights()),
    }.items():
        parts, total = losses[role].parts, losses[role].total
        assert parts["shared trunk"].parameters == sum(p.numel() for p in trunk.parameters())
        assert total.parameters == sum(p.numel() for m in (trunk, head) for p in m.parameters())
        for attribute in ("parameters", "macs"):
            assert sum(getattr(part, attribute) for part in parts.values()) == getattr(total, attribute)
        assert 0 < parts["shared trunk"].macs < total.macs < losses[role].backward_macs <= 2 * total.macs
    assert losses["pretext"].inputs == [(2, 3, 32, 32)] * 2  # two views of two images


def test_a_method_that_calls_modules_of_the_backbone_is_counted(tiny_config, at_scenes):
    build = "{_target_: bissl_zoo.registry.build_%s, name: %s, %s}"
    overrides = [
        "bilevel.shared_stage=null",
        "train.stages=[pretrain]",
        "backbone=" + build % ("backbone", "test_vit", "class_token: false, global_pool: avg, img_size: 32"),
        "pretext="
        + build
        % ("pretext", "mae", "augmentation: {_target_: bissl_zoo.data.views.masked_view, size: 32, mask_patch: 16}"),
    ]
    cfg = LazyConfig.apply_overrides(tiny_config(), overrides)
    loss = count_losses(random_context(cfg, find_data(cfg), CPU))["pretext"]
    assert loss.inputs == [(2, 3, 32, 32)] and 0 < loss.parts["shared trunk"].macs < loss.total.macs


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_a_random_batch_has_the_form_of_a_loaded_one(tiny_config, at_scenes, augment_on):
    cfg = tiny_config()
    cfg.dataloader.pretext.augment_on = augment_on
    context = random_context(cfg, find_data(cfg), CPU)
    _, pretext = build_pretext(cfg, Weights(), CPU)
    assert [view.shape for view in random_batch(context, "pretext", pretext, 11)] == [(11, 3, 32, 32)] * 2
    _, task = build_downstream(context, Weights())
    images, targets = random_batch(context, "train", task)
    assert len(images) == len(targets) == cfg.dataloader.train.batch_size


@pytest.mark.slow
def test_without_data_sets_steps_are_used_and_epochs_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "nothing"))
    data = find_data(load_config(VOC))
    assert data.lengths == {"pretext": None, "train": None} and len(data.classes) == 20
    assert all("is missing" in note for note in data.notes) and len(data.notes) == 2
    assert find_data(changed(VOC, "dataloader.train.dataset.classes=[cell,edge]")).classes == ["cell", "edge"]
    analysis = analyse(VOC, ["backbone.name=test_resnet", "bilevel.shared_stage=null"], timing=False)
    assert not analysis.costs and all(note in report(analysis) for note in data.notes)


# ------------------------------------------------------------------------------------------------ measurement


@pytest.fixture(scope="module")
def measured(tiny, scenes):
    """The tiny quickstart, measured once; its head warm-up lasts an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
        patch.setenv("OMP_NUM_THREADS", "1")
        overrides = [*tiny(finetune__baseline=True), "finetune.steps=null", "finetune.epochs=2"]
        return analyse(QUICKSTART, overrides)


@pytest.mark.slow
def test_every_stage_and_every_part_of_an_alternation_is_measured(measured):
    assert [(cost.stage, cost.what, cost.images) for cost in measured.costs] == [
        ("pretrain", "step", 8),
        ("head_warmup", "step", 4),
        ("bissl", "lower step", 8),
        ("bissl", "curvature", 8),
        ("bissl", "product", 8),
        ("bissl", "upper step", 4),
        ("finetune", "step", 4),
    ]
    for cost in measured.costs:
        assert cost.seconds > 0 and cost.peak >= 0
    costs = {cost.what: cost for cost in measured.costs if cost.stage == "bissl"}
    assert costs["upper step"].products >= 1
    assert costs["upper step"].seconds > costs["product"].seconds


@pytest.mark.slow
def test_the_duration_is_that_of_the_steps(measured):
    durations = {item.phase: item for item in measured.durations}
    assert {name: item.steps for name, item in durations.items()} == {
        "pretrain": 2, "head_warmup": 2, "bissl": 2, "finetune_pretrained": 8, "finetune": 8
    }  # fmt: skip
    seconds = {cost.what: cost.seconds for cost in measured.costs if cost.stage == "bissl"}
    alternation = 2 * seconds["lower step"] + seconds["curvature"] + seconds["upper step"]
    assert durations["bissl"].seconds == pytest.approx(2 * alternation)
    assert durations["finetune_pretrained"].seconds == durations["finetune"].seconds
    text = report(measured)
    for word in ("shared trunk", "head and loss", "upper step", "images/s", "h:mm:ss"):
        assert word in text


def test_a_step_that_runs_out_of_memory_has_no_seconds():
    gauge, cost = Gauge(CPU), Cost("pretrain", "step", 8)
    assert not gauge.median(cost, lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert cost.seconds is None and cost.peak is None
    with pytest.raises(RuntimeError, match="must match"):  # another error
        gauge.median(cost, lambda: torch.ones(2) + torch.ones(3))


def test_the_peak_is_that_of_the_step_alone():
    gauge, first, second = Gauge(CPU), Cost("a", "step", 1), Cost("a", "step", 1)
    assert gauge.fits(first, lambda: torch.ones(64 << 20, dtype=torch.uint8).sum())
    assert gauge.fits(second, lambda: torch.ones(1))
    assert first.peak >= 60 << 20
    assert second.peak <= first.peak - (40 << 20)


def test_a_stage_that_does_not_fit_into_memory_has_no_duration(tiny, at_scenes, monkeypatch):
    monkeypatch.setattr("bissl_zoo.analysis.model.measure", lambda *args: [Cost("pretrain", "step", 8)])
    analysis = analyse(QUICKSTART, [*tiny(), "train.stages=[pretrain]"])
    assert [item.seconds for item in analysis.durations] == [None]
    assert "out of memory" in report(analysis) and "set smaller dataloader" in report(analysis)
