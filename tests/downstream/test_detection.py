import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from bissl_zoo.backbones import share
from bissl_zoo.engine.build import Weights, build_downstream
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.evaluate import evaluate
from bissl_zoo.engine.stages import Bissl
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog"]
SMALL = dict(min_size=64, max_size=96, anchor_sizes=(8, 16, 32), box_head=32, score_threshold=0.0, detections=20)
PYRAMID_MAPS = ("c2", "c3", "c4", "c5")
# large enough for boxes on more than one map
PYRAMID = dict(min_size=256, max_size=384, anchor_sizes=(16, 32, 64, 128, 256), fpn_channels=16)


def build(stage="c3", architecture="test_resnet", out_features=(), model_args=(), **kwargs):
    torch.manual_seed(0)
    trunk, _ = build_backbone(name=architecture, **dict(model_args)).split(stage, out_features)
    return trunk, build_task(name="faster_rcnn", backbone=trunk, classes=CLASSES, **{**SMALL, **kwargs})


def build_pyramid(architecture="test_resnet", **kwargs):
    return build("c5", architecture, PYRAMID_MAPS, **{**PYRAMID, **kwargs})


def build_vit_pyramid(**kwargs):
    torch.manual_seed(0)
    vit = build_backbone(name="vit_tiny_patch16_224", depth=2, img_size=64, dynamic_img_size=True)
    trunk, _ = share(vit)
    settings = {**SMALL, **PYRAMID, **kwargs, "min_size": 64, "max_size": 96}
    return trunk, build_task(name="faster_rcnn", backbone=trunk, classes=CLASSES, **settings)


def test_a_plain_vit_with_a_class_token_has_the_simple_pyramid_of_vitdet():
    trunk, task = build_vit_pyramid()
    shapes = {name: tuple(level.shape[1:]) for name, level in task.fpn(trunk(torch.randn(1, 3, 64, 96))).items()}
    assert shapes == {"0": (16, 16, 24), "1": (16, 8, 12), "2": (16, 4, 6), "3": (16, 2, 3), "4": (16, 1, 2)}
    assert task.strides == [4, 8, 16, 32] and task.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    losses = task.train().losses(trunk.train(), two_images())
    sum(losses.values()).backward()
    assert all(
        p.grad is not None for name, p in trunk.named_parameters() if not name.startswith(("model.norm", "norm"))
    )
    assert len(task.eval().predict(trunk.eval(), two_images()[0])) == 2
    with pytest.raises(ConfigError, match="needs one size per map"):
        build_vit_pyramid(anchor_sizes=(8, 16))


def target(boxes, labels, difficult=None, image_id=0):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": image_id,
    }


def two_images():
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 48, 64, generator=generator), torch.rand(3, 80, 56, generator=generator)]
    return images, [
        target([[4, 6, 30, 40], [20, 8, 60, 30]], [0, 1]),
        target([[10, 20, 40, 70]], [1], image_id=1),
    ]


def reference(trunk, task):
    """torchvision's own detector with the weights of ours, on one map or with its own pyramid."""
    pyramid = len(trunk.out_features) > 1

    class Body(nn.Module):
        out_channels = 16 if pyramid else trunk.feature_info["c3"].channels

        def __init__(self):
            super().__init__()
            self.trunk = trunk
            channels = [trunk.feature_info[stage].channels for stage in trunk.out_features]
            self.fpn = FeaturePyramidNetwork(channels, 16, LastLevelMaxPool()) if pyramid else nn.Identity()

        def forward(self, images):
            return self.fpn(self.trunk(images))

    sizes = ((16,), (32,), (64,), (128,), (256,)) if pyramid else ((8, 16, 32),)
    model = torchvision.models.detection.FasterRCNN(
        Body(),
        min_size=256 if pyramid else 64,
        max_size=384 if pyramid else 96,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(["c2", "c3", "c4", "c5"] if pyramid else ["c3"], 7, 2),
        box_head=TwoMLPHead(Body.out_channels * 49, 32),
        box_predictor=FastRCNNPredictor(32, 3),
        box_score_thresh=0.0,
        box_detections_per_img=20,
    )
    model.rpn.load_state_dict(task.rpn.state_dict())
    model.roi_heads.load_state_dict(task.roi_heads.state_dict())
    if pyramid:
        model.backbone.fpn.load_state_dict(task.fpn.state_dict())
    return model


def losses(trunk, task, batch, seed=3):
    torch.manual_seed(seed)  # proposals are sampled
    return task.losses(trunk, batch)


def levels_used(task):
    """The maps that boxes were pooled from, filled in by the next passes."""
    seen = set()
    task.roi_heads.box_roi_pool.register_forward_pre_hook(
        lambda pool, args: seen.update(pool.map_levels(args[1]).tolist())
    )
    return seen


@pytest.mark.parametrize("built", [build, build_pyramid], ids=["one_map", "pyramid"])
def test_losses_and_gradients_equal_torchvisions(built):
    trunk, task = built()
    levels = levels_used(task)
    model = reference(trunk, task).train()
    images, targets = two_images()
    ours = losses(trunk, task, (images, targets))
    trunk_grads = torch.autograd.grad(sum(ours.values()), list(trunk.parameters()))
    torch.manual_seed(3)
    theirs = model(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
    assert set(ours) == set(theirs) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert len(levels) == (2 if task.fpn else 1)
    for ours_, theirs_ in zip(
        trunk_grads, torch.autograd.grad(sum(theirs.values()), list(trunk.parameters())), strict=True
    ):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("built", [build, build_pyramid], ids=["one_map", "pyramid"])
def test_predictions_equal_torchvisions_in_original_pixels(built):
    trunk, task = built()
    model = reference(trunk, task).eval()
    task.eval()
    images, _ = two_images()
    with torch.no_grad():
        theirs = model(images)
    ours = task.predict(trunk, images)
    assert all(len(prediction["boxes"]) for prediction in ours)
    for image, prediction, expected in zip(images, ours, theirs, strict=True):
        torch.testing.assert_close(prediction["boxes"], expected["boxes"], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(prediction["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(prediction["labels"], expected["labels"] - 1)
        height, width = image.shape[1:]
        corners = prediction["boxes"]
        assert (corners >= 0).all() and (corners[:, [0, 2]] <= width).all() and (corners[:, [1, 3]] <= height).all()
        assert not prediction["boxes"].requires_grad


def test_the_scale_of_a_map_does_not_depend_on_the_first_batch():
    predictions = []
    for first in (torch.rand(3, 16, 96), None):  # half of its batch is padding
        trunk, task = build()
        trunk.eval(), task.eval()
        if first is not None:
            task.predict(trunk, [first])
        predictions.append(task.predict(trunk, two_images()[0]))
    for one, other in zip(*predictions, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet"])
def test_a_pyramid_is_trained_on_any_backbone_with_maps_of_four_sizes(architecture):
    trunk, task = build_pyramid(architecture, min_size=64, max_size=96, anchor_sizes=None)
    losses_ = losses(trunk, task, two_images())
    sum(losses_.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses_.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.fpn.parameters())
    assert all(p.grad is not None for p in trunk.parameters())
    assert task.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert not any(name.startswith("fpn") for name in trunk.state_dict())


def test_a_pyramid_needs_maps_with_doubling_strides():
    plain = dict(class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match=r"'test_vit' returns blocks.2 \(stride 16\), blocks.5 \(stride 16\)"):
        build("blocks.5", "test_vit", ("blocks.2",), plain, fpn_channels=16)
    with pytest.raises(ConfigError, match=r"returns c3 \(stride 8\).*backbone.out_features.*task.fpn_channels=null"):
        build(fpn_channels=16)


def test_difficult_objects_are_left_out_of_training():
    trunk, task = build()
    images, targets = two_images()
    extra = {**targets[0], "difficult": torch.tensor([False, True])}
    without = {**targets[0], "boxes": targets[0]["boxes"][:1], "labels": targets[0]["labels"][:1]}
    without["difficult"] = torch.tensor([False])
    results = [losses(trunk, task, (images, [first, targets[1]])) for first in (extra, without, targets[0])]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["loss_classifier"], results[2]["loss_classifier"])
    assert len(extra["boxes"]) == 2  # the batch itself is as it was


def test_images_without_objects_train_the_background():
    trunk, task = build()
    result = losses(trunk, task, (two_images()[0], [target([], []), target([], [])]))
    assert all(torch.isfinite(loss) for loss in result.values())
    sum(result.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in [*trunk.parameters(), *task.parameters()])
    assert result["loss_box_reg"] == 0 and result["loss_rpn_box_reg"] == 0


def square_at(x):
    pixels = np.zeros((20, 50, 3), dtype=np.uint8)
    pixels[4:12, x : x + 10] = 255
    return Image.fromarray(pixels)


def test_a_flip_moves_the_boxes_with_the_pixels_only_in_training():
    _, task = build(flip_probability=1.0)
    given = target([[5, 4, 15, 12]], [1])
    image, moved = task.transform(train=True)(square_at(5), given)
    assert moved["boxes"].tolist() == [[35, 4, 45, 12]]
    assert (image[:, 4:12, 35:45] == 1).all() and image.sum() == 3 * 80
    assert given["boxes"].tolist() == [[5, 4, 15, 12]] and moved["labels"].tolist() == [1]
    assert task.transform(train=True)(square_at(5), target([], []))[1]["boxes"].shape == (0, 4)
    image, same = task.transform(train=False)(square_at(5), given)
    assert same is given and image.shape == (3, 20, 50) and (image[:, 4:12, 5:15] == 1).all()


SMALL_PYRAMID = dict(min_size=64, max_size=96, anchor_sizes=(8, 16, 32, 64, 128))


@pytest.mark.parametrize(("built", "args"), [(build, {}), (build_pyramid, SMALL_PYRAMID)], ids=["one_map", "pyramid"])
def test_under_autocast_boxes_are_computed_in_full_precision(built, args):
    trunk, task = built(**args)
    images, targets = two_images()
    targets[0]["boxes"] = targets[0]["boxes"] + 1 / 3  # nothing that bfloat16 could hold
    seen = []
    task.roi_heads.register_forward_pre_hook(lambda _, args: seen.append(args))
    plain = losses(trunk, task, (images, targets))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(trunk, task, (images, targets))
    (_, boxes, _, truth), (features, proposals, _, same) = seen
    assert all(feature.dtype == torch.float32 for feature in features.values())
    assert torch.equal(truth[0]["boxes"], same[0]["boxes"])
    for one, other in zip(boxes, proposals, strict=True):
        assert other.dtype == torch.float32 and not torch.equal(other, other.bfloat16().float())
        # deltas are rounded to 8 bits, coordinates of up to 96 pixels are not
        nearest = torch.cdist(other, one).min(dim=1).values
        assert nearest.median() < 0.01
    assert all(anchors.dtype == torch.float32 for anchors in task.rpn.anchor_generator.cell_anchors)
    # the same proposals are sampled, so that only the network's rounding is left
    for name, value in plain.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], value, rtol=0.03, atol=1e-3)


def pyramid_config(tiny_config, **changed):
    settings = {
        "+backbone__out_features": "[c2, c3, c4, c5]",
        "bilevel__shared_stage": "null",
        "+task__fpn_channels": 16,
        "task__anchor_sizes": "[8, 16, 32, 48, 64]",
        "bilevel__alternations": 1,
    }
    return tiny_config(**{**settings, **changed})


@pytest.mark.slow
def test_a_pyramid_goes_through_the_bilevel_stage_and_is_evaluated(tiny_config, at_scenes):
    context = open_context(pyramid_config(tiny_config), "test")
    trainer = Bissl().build(context, Weights())
    problem = trainer.problem
    assert problem.upper.backbone.out_features == PYRAMID_MAPS
    # the pyramid is the head's, so what the levels share is the backbone alone
    shared = [name for name, _ in problem.upper.backbone.named_parameters()]
    assert shared == [name for name, _ in problem.lower.backbone.named_parameters()]
    assert not any("inner_blocks" in name for name in shared)
    pyramid = {key: value.clone() for key, value in problem.upper.head.fpn.state_dict().items()}
    stem = problem.upper.backbone.state_dict()["conv1.0.weight"].clone()
    trainer.train()
    assert all(not torch.equal(value, pyramid[key]) for key, value in problem.upper.head.fpn.state_dict().items())
    assert not torch.equal(stem, problem.upper.backbone.state_dict()["conv1.0.weight"])
    assert problem.lower.step == 2 and problem.upper.step == 1
    result = trainer.result()
    trunk, task = build_downstream(context, Weights(result.backbone, task=result.task))
    assert {"AP50", "AP"} <= set(evaluate(context, trunk, task))


@pytest.mark.parametrize("size", [(20_000, 10), (3_200, 10), (3_199, 10)])
def test_a_very_thin_image_is_padded_until_a_row_remains(size):
    trunk, task = build(min_size=196, max_size=320)
    given = target([[0.0, 0.0, 1.0, 1.0]], [0])
    image, kept = task.transform(train=False)(Image.new("RGB", size, (255, 255, 255)), given)
    width, height = size
    assert torch.equal(image[:, :height, :width], torch.ones(3, height, width)) and kept is given
    padded = 3 * (image[0].numel() - width * height)
    assert (image == 0).sum() == padded and (padded > 0) == (max(size) >= 320 * min(size))
    trunk.eval(), task.eval()
    resized, _ = task.resize([image])
    assert min(resized.image_sizes[0]) >= 1 and max(resized.image_sizes[0]) <= 320
    (found,) = task.predict(trunk, [image])
    assert found["boxes"].shape[1] == 4
    trunk.train(), task.train()
    losses = task.losses(trunk, task.collate([task.transform(train=True)(Image.new("RGB", size), given)] * 2))
    assert all(torch.isfinite(loss) for loss in losses.values())
