"""Counts against closed forms and known figures, and what a measurement leaves."""

import os
import resource
import signal

import pytest
import torch
from torch import nn

from bissl_zoo.analysis import costs as module
from bissl_zoo.analysis.costs import KILLED, OUT_OF_MEMORY, Cost, Gauge, measure_in_a_process
from bissl_zoo.analysis.counts import count_losses, count_module, count_stages
from bissl_zoo.analysis.data import KnownData, look_at_data, noise_batch, noise_context
from bissl_zoo.analysis.model import analyse, report
from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.build import Weights, build_downstream, build_pretext, build_split_backbone
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import build_backbone

QUICKSTART = "quickstart/digit_scenes_det.py"
CPU = torch.device("cpu")
VOC = "bissl/voc_det.py"


def changed(config, *overrides):
    return LazyConfig.apply_overrides(load_config(config), overrides)


@pytest.fixture(scope="module")
def measured(tiny, scenes):
    """The tiny quickstart, measured once; its head warm-up is as long as an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
        patch.setenv("OMP_NUM_THREADS", "1")
        overrides = [*tiny(finetune__baseline=True), "finetune.steps=null", "finetune.epochs=2"]
        return analyse(QUICKSTART, overrides)


def test_the_flops_of_a_convolution_and_a_linear_layer_are_their_closed_forms():
    layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))
    count = count_module(layers, torch.zeros(1, 3, 16, 16))
    assert count.flops == 8 * 8 * 8 * 3 * 5 * 5 + 8 * 8 * 8 * 10
    assert count.activations == 8 * 8 * 8 + 10
    assert count.parameters == 8 * 3 * 5 * 5 + 8 * 8 * 8 * 10 + 10


def test_the_flops_of_attention_are_its_two_products():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x[..., :5, :], x[..., :5, :4])

    count = count_module(Attention(), torch.zeros(1, 2, 7, 6))
    assert count.flops == 2 * 7 * 5 * (6 + 4)
    assert not count.uncounted


def test_resnet50_has_its_known_flops_and_parameters_at_224_pixels():
    stages, whole = count_stages(changed(VOC), torch.zeros(1, 3, 224, 224))
    assert whole.flops == pytest.approx(4.1e9, rel=0.01)  # He et al., arXiv 1512.03385: multiply-adds
    assert whole.parameters == 25_557_032 - (2048 * 1000 + 1000)  # torchvision's, without the classifier
    assert [stage.map for stage in stages[:5]] == [
        (64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)
    ]  # fmt: skip
    assert [stage.part for stage in stages] == ["shared"] * 4 + ["tail"] * 2


def test_a_vit_has_its_known_flops():
    vit = build_backbone(name="vit_small_patch16_224", class_token=False, global_pool="avg").eval()
    count = count_module(vit.model, torch.zeros(1, 3, 224, 224))
    # 12 layers of 12 D^2 + 2 N D per token, and the embedding of N patches of 768 numbers
    tokens, width = 196, 384
    assert count.flops == pytest.approx(tokens * (12 * (12 * width**2 + 2 * tokens * width) + 768 * width), rel=0.01)


def test_the_stages_add_up_to_the_whole_and_so_do_trunk_and_tail():
    cfg, image = changed(VOC, "backbone.name=resnet18"), torch.zeros(1, 3, 64, 64)
    stages, whole = count_stages(cfg, image)
    trunk, tail = (part.eval() for part in build_split_backbone(cfg))

    class Trunk(nn.Sequential):
        def forward(self, images):
            return self[0](images)["c4"]

    halves = count_module(Trunk(trunk), image), count_module(tail, trunk(image)["c4"])
    for attribute in ("flops", "activations"):
        assert sum(getattr(stage.count, attribute) for stage in stages) == getattr(whole, attribute)
        assert sum(getattr(half, attribute) for half in halves) == getattr(whole, attribute)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (trunk, tail)]
    for part, size in zip(("shared", "tail"), sizes, strict=True):
        assert sum(stage.count.parameters for stage in stages if stage.part == part) == size
    assert sum(sizes) == whole.parameters


def test_the_parameters_of_the_losses_are_those_of_their_modules(tiny_config, at_scenes):
    cfg = tiny_config()
    context = noise_context(cfg, look_at_data(cfg), CPU)
    losses = count_losses(context)
    for role, (trunk, head) in {
        "pretext": build_pretext(cfg, Weights(), CPU),
        "train": build_downstream(context, Weights()),
    }.items():
        parts, total = losses[role].parts, losses[role].total
        assert parts["shared trunk"].parameters == sum(p.numel() for p in trunk.parameters())
        assert total.parameters == sum(p.numel() for m in (trunk, head) for p in m.parameters())
        for attribute in ("parameters", "flops", "activations"):
            assert sum(getattr(part, attribute) for part in parts.values()) == getattr(total, attribute)
    assert losses["pretext"].inputs == [(2, 3, 32, 32)] * 2  # an image's two views, of two images


def test_a_teacher_has_parameters_that_are_not_trained(tiny, at_scenes):
    byol = "{_target_: bissl_zoo.registry.build_pretext, name: byol, projector: [8, 8], predictor: [8, 8]}"
    cfg = changed(QUICKSTART, *[o for o in tiny() if not o.startswith("pretext.")], f"pretext={byol}")
    parts = count_losses(noise_context(cfg, look_at_data(cfg), CPU))["pretext"].parts
    teacher = parts["teacher"]
    assert teacher.trained == 0
    assert teacher.parameters == sum(parts[name].parameters for name in ("shared trunk", "tail", "projector"))
    students = sum(parts[name].flops for name in ("shared trunk", "tail", "projector"))
    assert teacher.flops == pytest.approx(students, rel=0.1)  # both see both views; batch norm differs


def test_operators_that_are_not_counted_are_named(measured):
    class Sorted(nn.Module):
        def forward(self, x):
            return x.sort().values.cumsum(0)

    assert count_module(Sorted(), torch.zeros(4)).uncounted == {"aten::sort": 1, "aten::cumsum": 1}
    assert measured.losses["train"].total.uncounted["torchvision::roi_align"] == 1
    assert "torchvision::roi_align 1" in report(measured)


def test_what_does_not_trace_is_said_and_keeps_its_parameters():
    class Stubborn(nn.Linear):
        def forward(self, x):
            raise TypeError("not today")

    count = count_module(Stubborn(3, 2), torch.zeros(1, 3))
    assert count.flops is None and count.parameters == 8
    assert count.problem == "it does not trace (TypeError: not today)"


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_a_batch_of_noise_is_what_the_loader_would_bring(tiny_config, at_scenes, augment_on):
    cfg = tiny_config()
    cfg.dataloader.pretext.augment_on = augment_on
    context = noise_context(cfg, look_at_data(cfg), CPU)
    _, pretext = build_pretext(cfg, Weights(), CPU)
    views = noise_batch(context, "pretext", pretext, 11)
    assert [view.shape for view in views] == [(11, 3, 32, 32)] * 2
    _, task = build_downstream(context, Weights())
    images, targets = noise_batch(context, "train", task)
    assert len(images) == len(targets) == cfg.dataloader.train.batch_size


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
        assert cost.seconds > 0 and cost.peak >= 0 and not cost.problem


def test_an_upper_step_costs_more_than_one_product(measured):
    seconds = {cost.what: cost.seconds for cost in measured.costs if cost.stage == "bissl"}
    (products,) = {cost.products for cost in measured.costs if cost.what == "upper step"}
    assert products >= 1
    assert seconds["upper step"] > seconds["product"]


def test_the_duration_is_that_of_the_steps(measured):
    durations = {one.phase: one for one in measured.durations}
    assert {name: one.steps for name, one in durations.items()} == {
        "pretrain": 2, "head_warmup": 2, "bissl": 2, "finetune_pretrained": 8, "finetune": 8
    }  # fmt: skip
    seconds = {cost.what: cost.seconds for cost in measured.costs if cost.stage == "bissl"}
    alternation = 2 * seconds["lower step"] + seconds["curvature"] + seconds["upper step"]
    assert durations["bissl"].seconds == pytest.approx(2 * alternation)
    assert durations["finetune_pretrained"].seconds == durations["finetune"].seconds


def test_the_report_says_what_is_left_out(measured):
    page = report(measured)
    assert "reading and augmenting images, evaluations and checkpoints are left out" in page
    for word in ("shared trunk", "tail", "projector", "roi_heads", "upper step", "images/s", "h:mm:ss"):
        assert word in page


def test_without_data_sets_steps_are_used_and_epochs_are_unknown(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "nothing"))
    data = look_at_data(load_config(VOC))
    assert data.lengths == {"pretext": None, "train": None} and len(data.classes) == 20
    assert all("is not there" in note for note in data.notes) and len(data.notes) == 2
    found = analyse(VOC, ["backbone.name=test_resnet", "bilevel.shared_stage=null"], timing=False)
    assert not found.costs and all(note in report(found) for note in data.notes)


def test_classes_that_the_config_names_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "nothing"))
    assert look_at_data(changed(VOC, "dataloader.train.dataset.classes=[cell,edge]")).classes == ["cell", "edge"]


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0])
def test_a_scale_that_makes_no_sense_is_refused(scale):
    with pytest.raises(ConfigError, match="scale of the batches"):
        analyse(QUICKSTART, scale=scale)


def test_a_step_for_which_memory_does_not_suffice_is_said_so():
    gauge, cost = Gauge(CPU), Cost("pretrain", "step", 8)
    assert not gauge.median(cost, lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert cost.seconds is None and cost.problem == OUT_OF_MEMORY


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="must match"):
        Gauge(CPU).median(Cost("pretrain", "step", 8), lambda: torch.ones(2) + torch.ones(3))


def test_the_peak_is_that_of_the_step_alone():
    gauge, first, second = Gauge(CPU), Cost("a", "step", 1), Cost("a", "step", 1)
    assert gauge.has_room(first, lambda: torch.ones(64 << 20, dtype=torch.uint8).sum())
    assert gauge.has_room(second, lambda: torch.ones(1))
    assert first.peak >= 60 << 20
    assert second.peak <= first.peak - (40 << 20)


def test_asking_for_more_memory_than_is_free_raises_rather_than_kills():
    free = module._status_bytes("/proc/meminfo", "MemAvailable")
    if free is None:
        pytest.skip("this system does not tell how much memory is free")
    before, cost = resource.getrlimit(resource.RLIMIT_DATA), Cost("pretrain", "step", 8)
    module._limit_memory()
    try:
        assert not Gauge(CPU).median(cost, lambda: torch.empty(free, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert cost.problem == OUT_OF_MEMORY


def test_a_measurement_that_is_killed_is_said_so(tiny, at_scenes, tmp_path):
    file = tmp_path / "dies_in_a_child.py"
    file.write_text(f"import os\nif os.getpid() != {os.getpid()}: os.kill(os.getpid(), {int(signal.SIGKILL)})\n")
    known = KnownData({"pretext": 24, "train": 16}, ["a"])
    costs = measure_in_a_process(QUICKSTART, [*tiny(), f"train.imports=[{file}]"], 1.0, known, Weights())
    assert [cost.problem for cost in costs] == [KILLED]


def test_what_memory_does_not_suffice_for_is_in_the_report(tiny, at_scenes, monkeypatch):
    costs = [Cost("pretrain", "step", 8, problem=OUT_OF_MEMORY)]
    monkeypatch.setattr("bissl_zoo.analysis.model.measure_in_a_process", lambda *args: costs)
    found = analyse(QUICKSTART, [*tiny(), "train.stages=[pretrain]"])
    assert found.durations[0].seconds is None
    assert OUT_OF_MEMORY in report(found) and "--batch-scale" in report(found)


def test_batches_that_are_scaled_stretch_the_run(tiny, at_scenes, monkeypatch):
    costs = [Cost("pretrain", "step", 4, seconds=0.5)]
    monkeypatch.setattr("bissl_zoo.analysis.model.measure_in_a_process", lambda *args: costs)
    found = analyse(QUICKSTART, [*tiny(), "train.stages=[pretrain]"], scale=0.5)
    assert found.durations[0].seconds == pytest.approx(2 * 0.5 / 0.5)
    assert "Measured with 0.5 of each batch" in report(found)


def test_each_part_of_an_alternation_is_stretched_to_its_own_batch(tiny, at_scenes, monkeypatch):
    costs = [
        Cost("bissl", "lower step", 2, seconds=1.0),
        Cost("bissl", "curvature", 2, seconds=2.0),
        Cost("bissl", "product", 2, seconds=3.0),
        Cost("bissl", "upper step", 2, seconds=16.0, products=2.0),
    ]
    monkeypatch.setattr("bissl_zoo.analysis.model.measure_in_a_process", lambda *args: costs)
    found = analyse(QUICKSTART, [*tiny(), "train.stages=[bissl]", "bilevel.curvature_batch_size=6"], scale=0.25)
    alternation = {one.phase: one for one in found.durations}["bissl"].seconds_per_step
    # 2 lower steps on 8 images, a graph and 2 products on 6, and what else an upper step does on 4
    assert alternation == pytest.approx(2 * 1.0 * 4 + 2.0 * 3 + (2 * 3.0 * 3 + 10.0 * 2))
