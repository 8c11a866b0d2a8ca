import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog"]
SMALL = dict(min_size=64, max_size=96, anchor_sizes=(8, 16, 32), box_head=32, score_threshold=0.0, detections=20)


def build(**kwargs):
    torch.manual_seed(0)
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    return trunk, build_task(name="faster_rcnn", backbone=trunk, classes=CLASSES, **{**SMALL, **kwargs})


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
    """torchvision's own detector with the weights of ours."""

    class Body(nn.Module):
        out_channels = trunk.feature_info["c3"].channels

        def __init__(self):
            super().__init__()
            self.trunk = trunk

        def forward(self, images):
            return self.trunk(images)

    model = torchvision.models.detection.FasterRCNN(
        Body(),
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8, 16, 32),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["c3"], 7, 2),
        box_head=TwoMLPHead(Body.out_channels * 49, 32),
        box_predictor=FastRCNNPredictor(32, 3),
        box_score_thresh=0.0,
        box_detections_per_img=20,
    )
    model.rpn.load_state_dict(task.rpn.state_dict())
    model.roi_heads.load_state_dict(task.roi_heads.state_dict())
    return model


def losses(trunk, task, batch, seed=3):
    torch.manual_seed(seed)  # proposals are sampled
    return task.losses(trunk, batch)


def test_losses_and_gradients_equal_torchvisions():
    trunk, task = build()
    model = reference(trunk, task).train()
    images, targets = two_images()
    ours = losses(trunk, task, (images, targets))
    trunk_grads = torch.autograd.grad(sum(ours.values()), list(trunk.parameters()))
    torch.manual_seed(3)
    theirs = model(images, [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets])
    assert set(ours) == set(theirs) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)
    for ours_, theirs_ in zip(
        trunk_grads, torch.autograd.grad(sum(theirs.values()), list(trunk.parameters())), strict=True
    ):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-6)


def test_predictions_equal_torchvisions_in_original_pixels():
    trunk, task = build()
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


def test_targets_are_not_changed_by_the_losses():
    trunk, task = build()
    images, targets = two_images()
    copies = [{k: v.clone() if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    pixels = [image.clone() for image in images]
    losses(trunk, task, (images, targets))
    for now, before in zip(targets, copies, strict=True):
        assert all(torch.equal(now[key], before[key]) for key in ("boxes", "labels", "difficult"))
    assert all(torch.equal(a, b) for a, b in zip(images, pixels, strict=True))


@pytest.mark.parametrize("all_empty", [True, False])
def test_images_without_objects_train_the_background(all_empty):
    trunk, task = build()
    images, targets = two_images()
    targets = [target([], []), target([], []) if all_empty else targets[1]]
    result = losses(trunk, task, (images, targets))
    assert all(torch.isfinite(loss) for loss in result.values())
    sum(result.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in [*trunk.parameters(), *task.parameters()])
    if all_empty:
        assert result["loss_box_reg"] == 0 and result["loss_rpn_box_reg"] == 0


def square_at(x):
    pixels = np.zeros((20, 50, 3), dtype=np.uint8)
    pixels[4:12, x : x + 10] = 255
    return Image.fromarray(pixels)


def test_a_flip_moves_the_boxes_with_the_pixels():
    _, task = build(flip_probability=1.0)
    given = target([[5, 4, 15, 12]], [1])
    image, moved = task.transform(train=True)(square_at(5), given)
    assert moved["boxes"].tolist() == [[35, 4, 45, 12]]
    assert (image[:, 4:12, 35:45] == 1).all() and image.sum() == 3 * 80
    assert given["boxes"].tolist() == [[5, 4, 15, 12]] and moved["labels"].tolist() == [1]


def test_a_flip_of_no_boxes_keeps_their_shape():
    _, task = build(flip_probability=1.0)
    _, moved = task.transform(train=True)(square_at(5), target([], []))
    assert moved["boxes"].shape == (0, 4)


def test_test_images_are_never_flipped():
    _, task = build(flip_probability=1.0)
    image, kept = task.transform(train=False)(square_at(5), target([[5, 4, 15, 12]], [1]))
    assert kept["boxes"].tolist() == [[5, 4, 15, 12]] and (image[:, 4:12, 5:15] == 1).all()
    assert image.shape == (3, 20, 50) and image.dtype == torch.float32


def test_half_the_training_images_are_flipped_by_default():
    _, task = build()
    torch.manual_seed(0)
    transform = task.transform(train=True)
    flips = [transform(square_at(5), target([[5, 4, 15, 12]], [1]))[1]["boxes"][0, 0] == 35 for _ in range(200)]
    assert 75 < sum(flips) < 125  # 100 with a standard deviation of 7


def test_its_evaluator_takes_its_predictions():
    trunk, task = build()
    trunk.eval(), task.eval()
    images, targets = two_images()
    evaluator = task.evaluator()
    evaluator.process(task.predict(trunk, images), targets)
    assert {"AP50", "AP", "AP75"} <= set(evaluator.evaluate())


def test_a_few_steps_fit_two_bright_squares():
    trunk, task = build(rpn_proposals=(100, 50), roi_batch=64)
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, 10:30, 12:36] = 1.0
    images[1, 0, 30:54, 20:44] = 1.0
    batch = list(images), [target([[12, 10, 36, 30]], [0]), target([[20, 30, 44, 54]], [1], image_id=1)]
    optimizer = torch.optim.AdamW([*trunk.parameters(), *task.parameters()], lr=2e-3)
    history = []
    for step in range(30):
        loss = sum(losses(trunk, task, batch, seed=step).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_under_autocast_boxes_are_computed_in_full_precision():
    trunk, task = build()
    images, targets = two_images()
    targets[0]["boxes"] = targets[0]["boxes"] + 1 / 3  # nothing that bfloat16 could hold
    seen = []
    task.roi_heads.register_forward_pre_hook(lambda _, args: seen.append(args))
    plain = losses(trunk, task, (images, targets))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(trunk, task, (images, targets))
    (_, boxes, _, truth), (features, proposals, _, kept) = seen
    assert features["c3"].dtype == torch.float32
    assert torch.equal(truth[0]["boxes"], kept[0]["boxes"])
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
