"""The Detectron2 task against Detectron2's own network, mapper and evaluator."""

import numpy as np
import pytest
import torch
from detectron2_tasks import (
    CLASSES,
    KINDS,
    batch_of,
    build,
    direct,
    losses,
    mapped_by_detectron2,
    needs_detectron2,
    samples,
    target,
)

from bissl_zoo.registry import build_task

pytestmark = needs_detectron2


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_boxes_equal_those_of_detectron2_itself(kind, tmp_path):
    from detectron2.utils.events import EventStorage

    whole, trunk, task = build(kind, name="resnet18", rpn_proposals=[100, 100], roi_batch=4096)  # so that none is drawn
    for key, value in whole.state_dict().items():  # statistics that do something
        if "running_" in key:
            value.uniform_(*((-0.1, 0.1) if key.endswith("mean") else (0.5, 1.5)))
    trunk.load_state_dict({key: whole.state_dict()[key] for key in trunk.state_dict()})
    trunk.eval()  # Detectron2's batch norm is frozen
    model = direct(kind, task, whole, tmp_path).train()
    np.random.seed(7)
    ours = losses(trunk, task, batch_of(task, samples()))
    torch.manual_seed(3)
    with EventStorage():
        theirs = model(mapped_by_detectron2(samples(), tmp_path, train=True))
    assert set(ours) == set(theirs) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    bottom = model.backbone.bottom_up if kind == "FPN" else model.backbone
    for one, other in (
        (dict(task.model.roi_heads.named_parameters()), dict(model.roi_heads.named_parameters())),
        (dict(task.model.proposal_generator.named_parameters()), dict(model.proposal_generator.named_parameters())),
        ({"": trunk.model.conv1.weight}, {"": bottom.stem.conv1.weight}),
    ):
        assert list(one) == list(other)
        for key, parameter in one.items():
            torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-3, atol=1e-5)

    task.eval(), model.eval()
    found = task.predict(trunk, batch_of(task, samples(), train=False)[0])
    with torch.no_grad():
        expected = [one["instances"] for one in model(mapped_by_detectron2(samples(), tmp_path, train=False))]
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) == 20 and not one["boxes"].requires_grad
        torch.testing.assert_close(one["scores"], other.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one["boxes"], other.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
        assert torch.equal(one["labels"], other.pred_classes)


def test_both_engines_show_a_backbone_the_same_pixels_and_get_the_same_features():
    whole, trunk, task = build()
    other = build_task(name="faster_rcnn", backbone=trunk, classes=CLASSES, min_size=64, max_size=96, box_head=16)
    trunk.eval(), task.eval(), other.eval()
    seen = []
    trunk.register_forward_hook(lambda _, inputs, maps: seen.append((inputs[0], maps["c4"])))
    pairs = samples(((96, 64), (96, 64)))  # of the size that both resize to: how they interpolate is not compared
    for one in (task, other):
        one.predict(trunk, batch_of(one, pairs, train=False)[0])
    (pixels, features), (their_pixels, their_features) = seen
    torch.testing.assert_close(pixels, their_pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(features, their_features, rtol=1e-5, atol=1e-5)
    rgb = torch.from_numpy(np.array(pairs[0][0])).permute(2, 0, 1) / 255  # timm's own order, mean and std
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0], (rgb - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-5)
    assert not torch.allclose(pixels[0], pixels[0].flip(0), atol=0.1)  # the order of the channels shows


def test_samples_are_those_of_detectron2s_mapper(tmp_path):
    _, _, task = build(min_size=[40, 64, 80])
    pairs = samples() * 4
    pairs[2][1]["boxes"][0] = torch.tensor([0.0, 0.0, 48.0, 32.0])
    np.random.seed(5)
    images, targets = batch_of(task, pairs)
    theirs = mapped_by_detectron2(pairs, tmp_path, train=True, sizes=[40, 64, 80], seed=5)
    assert len({image["image"].shape for image in images}) > 2
    for image, found, other in zip(images, targets, theirs, strict=True):
        assert image["image"].dtype == torch.uint8 and torch.equal(image["image"], other["image"])
        assert (image["height"], image["width"]) == (other["height"], other["width"])
        assert torch.equal(found["boxes"], other["instances"].gt_boxes.tensor)
        assert torch.equal(found["labels"], other["instances"].gt_classes)
    tested, kept = batch_of(task, pairs, train=False)
    for image, found, (_, before) in zip(tested, kept, pairs, strict=True):
        assert min(image["image"].shape[1:]) == 64 and found is before  # the longer side is 96, which limits it


def random_detections(difficult):
    """Predictions that are the objects moved a little, and others."""
    generator = torch.Generator().manual_seed(4)
    predictions, targets = [], []
    for image_id in range(8):
        corners = 60 * torch.rand(6, 2, generator=generator)
        boxes = torch.cat([corners, corners + 4 + 40 * torch.rand(6, 2, generator=generator)], dim=1)
        labels = torch.randint(2, (6,), generator=generator)
        flags = [difficult and number == 0 for number in range(4)]
        targets.append(target(boxes[:4].tolist(), labels[:4].tolist(), flags, image_id=image_id))
        moved = boxes + 3 * torch.randn(6, 4, generator=generator)
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        predictions.append({"boxes": moved, "labels": labels, "scores": torch.rand(6, generator=generator)})
    return predictions, targets


def test_detectron2s_evaluator_and_the_common_one_agree_where_nothing_is_difficult():
    from detectron2.data import MetadataCatalog

    _, _, task = build()
    before = set(MetadataCatalog.list())
    evaluator = task.evaluator()
    evaluator.process(*random_detections(difficult=False))
    figures = evaluator.evaluate()
    assert 0.1 < figures["AP"] < 0.9
    for name in ("AP", "AP50", "AP75"):
        assert figures[f"detectron2_{name}"] == pytest.approx(figures[name], abs=1e-9)
    by_class = [figures[f"detectron2_AP/{name}"] for name in CLASSES]
    assert sum(by_class) / 2 == pytest.approx(figures["AP"], abs=1e-9)
    assert "detectron2_APl" not in figures  # there are no large objects
    assert set(MetadataCatalog.list()) == before
    common = build(evaluator="common")[2].evaluator()
    common.process(*random_detections(difficult=False))
    assert common.evaluate() == {name: value for name, value in figures.items() if not name.startswith("detectron2")}


def test_difficult_objects_are_crowds_to_detectron2s_evaluator():
    predictions, targets = random_detections(difficult=True)
    found = [{key: value[:1] for key, value in one.items()} for one in predictions]  # of the difficult ones only
    right = [{key: value[1:4] for key, value in one.items()} for one in predictions]
    for one, other in zip(right, targets, strict=True):
        one["boxes"] = other["boxes"][1:]
    evaluator = build()[2].evaluator()
    evaluator.process(right, targets)
    assert evaluator.evaluate()["detectron2_AP"] == pytest.approx(1.0)
    both = [{key: torch.cat([one[key], other[key]]) for key in one} for one, other in zip(right, found, strict=True)]
    for one, other in zip(both, targets, strict=True):
        one["boxes"][-1] = other["boxes"][0]
        one["scores"] = torch.tensor([0.5, 0.5, 0.5, 0.9])
    evaluator.process(both, targets)
    assert evaluator.evaluate()["detectron2_AP"] == pytest.approx(1.0)
