"""The Detectron2 task by itself; without Detectron2, what is said of that."""

import math
import pickle
import subprocess
import sys

import pytest
import torch
from detectron2_tasks import KINDS, batch_of, build, losses, needs_detectron2, samples, target

from bissl_zoo.bilevel.level import Level
from bissl_zoo.config import load_config
from bissl_zoo.errors import ConfigError, NonFiniteLoss
from bissl_zoo.registry import DOWNSTREAM_TASKS


@pytest.mark.slow
def test_the_task_is_registered_and_importing_it_imports_no_detectron2():
    assert "detectron2_faster_rcnn" in DOWNSTREAM_TASKS
    program = "import bissl_zoo.downstream.detectron2, sys; assert 'detectron2' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_without_detectron2_the_error_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if it were not there
    for module in ("detectron2_model", "detectron2_data"):
        monkeypatch.delitem(sys.modules, f"bissl_zoo.downstream.{module}", raising=False)
    with pytest.raises(ConfigError) as caught:
        build()
    for said in (
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
        f"compiled against the installed torch ({torch.__version__})",
        "'faster_rcnn'",
    ):
        assert said in str(caught.value)


def test_the_config_is_voc_det_with_the_task_exchanged():
    cfg, theirs = (load_config(f"bissl/{name}.py") for name in ("voc_det_detectron2", "voc_det"))
    assert {key for key in {*cfg, *theirs} if cfg[key] != theirs[key]} == {"train", "task"}
    assert cfg.train.output_dir != theirs.train.output_dir
    assert cfg.task.name == "detectron2_faster_rcnn"
    assert {key: cfg.task[key] for key in theirs.task if key != "name"} == {
        key: value for key, value in theirs.task.items() if key != "name"
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(config="C5"), "task.config is 'C5'; accepted are C4 and FPN"),
        (dict(evaluator="detectron"), "Did you mean 'detectron2'"),
        (dict(config="C4", fpn_channels=32), "task.config is C4, not FPN"),
    ],
)
def test_unknown_kinds_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        build(**given)


@needs_detectron2
@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("FPN", dict(anchor_sizes=[8, 16]), "its levels are p2, p3, p4, p5, p6 here, but there are 2 sizes"),
        ("res5", dict(config="FPN"), "backbone.out_features="),
        ("res5", dict(overrides={"proposal_generator.nms_tresh": 0.5}), "Did you mean 'nms_thresh'"),
        ("res5", dict(overrides={"input_format": "BGR"}), "images are RGB here.*bissl convert --channel-order BGR"),
    ],
)
def test_what_detectron2_does_not_know_is_refused(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        build(kind, **given)


@needs_detectron2
def test_values_are_left_to_detectron2_or_given_by_its_keys_or_by_ours():
    _, _, task = build("res5", roi_batch=None)
    assert task.model.roi_heads.batch_size_per_image == 512 and task.model.proposal_generator.nms_thresh == 0.7
    assert task.model.proposal_generator.post_nms_topk == {True: 2000, False: 1000}
    overrides = {
        "proposal_generator.nms_thresh": 0.6,
        "roi_heads.res5.norm": "GN",
        "roi_heads.box_predictor.smooth_l1_beta": 0.5,  # an argument that Detectron2's config leaves out
    }
    _, _, task = build("res5", overrides=overrides, rpn_proposals=[70, 60], mean=[0.5, 0.4, 0.3])
    assert task.model.proposal_generator.nms_thresh == 0.6
    assert task.model.proposal_generator.post_nms_topk == {True: 70, False: 60}
    assert any(isinstance(module, torch.nn.GroupNorm) for module in task.model.roi_heads.res5.modules())
    assert task.model.roi_heads.box_predictor.smooth_l1_beta == 0.5
    torch.testing.assert_close(task.model.pixel_mean.flatten(), torch.tensor([127.5, 102.0, 76.5]))


@needs_detectron2
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_holds_nothing_of_the_trunk(kind):
    _, trunk, task = build(kind)
    names = list(task.state_dict())
    result = losses(trunk, task, batch_of(task, samples()))
    sum(result.values()).backward()
    assert list(task.state_dict()) == names
    parts = {".".join(name.split(".")[:2]) for name in names}
    pyramid = {"model.backbone"} if kind == "FPN" else set()
    assert parts == {"model.proposal_generator", "model.roi_heads"} | pyramid
    assert all("fpn_" in name for name in names if name.startswith("model.backbone"))
    assert not {id(p) for p in trunk.parameters()} & {id(p) for p in task.parameters()}
    assert all(p.grad is not None for p in [*trunk.parameters(), *task.parameters()])
    again = build(kind)[2]
    again.load_state_dict(task.state_dict())
    assert "detectron2.model_zoo" not in sys.modules


@needs_detectron2
def test_transforms_go_to_spawned_workers():
    _, _, task = build()
    transform = pickle.loads(pickle.dumps(task.transform(train=False)))
    image, _ = transform(*samples()[0])
    assert image["image"].shape == (3, 64, 96)


@needs_detectron2
def test_difficult_objects_are_left_out_of_training():
    _, trunk, task = build(flip_probability=0.0)
    first, second = samples()
    plain = first[1]
    extra = {**plain, "difficult": torch.tensor([False, True])}
    without = target(plain["boxes"][:1].tolist(), [0])
    results = [losses(trunk, task, batch_of(task, [(first[0], found), second])) for found in (extra, without, plain)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["loss_cls"], results[2]["loss_cls"])


@needs_detectron2
@pytest.mark.parametrize("kind", ["two layers", "FPN"])
def test_under_autocast_boxes_are_not_rounded(kind):
    _, trunk, task = build(kind)
    batch = batch_of(task, samples())
    seen = []
    pooler = task.model.roi_heads.box_pooler
    pooler.register_forward_pre_hook(lambda _, args: seen.append(args))
    plain = losses(trunk, task, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(trunk, task, batch)
    features, boxes = seen[1]
    assert all(one.dtype == torch.float32 for one in features)
    assert all(one.tensor.dtype == torch.float32 for one in boxes)
    assert not any(torch.equal(one.tensor, one.tensor.bfloat16().float()) for one in boxes)
    for name in ("loss_rpn_cls", "loss_rpn_loc"):  # for the others, other proposals are sampled
        torch.testing.assert_close(rounded[name].float(), plain[name], rtol=0.03, atol=1e-3)


@needs_detectron2
def test_proposals_that_are_not_finite_are_told_with_level_and_step():
    _, trunk, task = build()
    with torch.no_grad():
        task.model.proposal_generator.rpn_head.anchor_deltas.bias.fill_(math.nan)
    level = Level("upper", trunk, task, None, iter(()), None, total_steps=1, step=5)
    with pytest.raises(NonFiniteLoss, match=r"upper level, step 5, rank 0: .*loss_proposals=nan"):
        level.checked(level.loss(trunk, batch_of(task, samples()))[1], torch.ones(()))
    assert task.trunk_slot.trunk == ()
