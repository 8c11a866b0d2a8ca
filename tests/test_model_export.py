"""An exported model gives the same outputs in the other library, detectors after suppression."""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from models import CLASSES, new_model, photo
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as tv

from bissl_zoo.downstream.export import anchor_order
from bissl_zoo.errors import BisslZooError, ZooError
from bissl_zoo.weights.files import read_file

DETECTOR = {"box_head": 16, "sampling_ratio": 1, "score_threshold": 0.0, "rpn_proposals": (200, 50), "min_size": 64}


def pixels(image):
    """Return `(1, 3, H, W)` in [0, 1]."""
    return tv.pil_to_tensor(image)[None] / 255


def onnx_outputs(path, images):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": np.asarray(images)})]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "multilabel_classification"])
def test_exported_classifiers_give_the_probabilities_of_any_batch(task, tmp_path):
    model = new_model(task, image_size=32, resize=32)
    images = [photo(32, 32, seed) for seed in range(3)]
    expected = torch.tensor([list(result["probabilities"].values()) for result in model.predict(images)])
    batch = torch.cat([pixels(image) for image in images])
    program = torch.export.load(model.export(tmp_path / "model.pt2").path).module()
    torch.testing.assert_close(program(batch), expected, rtol=1e-4, atol=1e-5)
    if task == "classification":
        written = model.export(tmp_path / "model.onnx")
        torch.testing.assert_close(onnx_outputs(written.path, batch)[0], expected, rtol=1e-4, atol=1e-5)
        assert written.details["input"] == "images (batch, 3, 32, 32)" and "héron" in written.details["classes"]


@pytest.mark.slow
@pytest.mark.parametrize("pyramid", [False, True])
def test_exported_detectors_give_the_same_boxes_after_suppression(pyramid, tmp_path):
    maps, anchors = (("c3", "c4", "c5"), [8, 16, 32, 64]) if pyramid else ((), [16, 32])
    more = {"fpn_channels": 8} if pyramid else {}
    stage = None if pyramid else "c3"
    model = new_model("faster_rcnn", stage, maps, **DETECTOR, max_size=128, anchor_sizes=anchors, **more)
    image = photo(96, 80, seed=3)
    expected = model.predict(image, threshold=0.0)
    assert len(expected["boxes"]) > 20
    program = torch.export.load(model.export(tmp_path / "model.pt2", image_size=(80, 96)).path).module()
    outputs = [program(pixels(image))]
    if pyramid:
        written = model.export(tmp_path / "model.onnx", image_size=(80, 96))
        outputs.append(onnx_outputs(written.path, pixels(image)))
    for boxes, scores, labels in outputs:
        assert [CLASSES[label] for label in labels.tolist()] == expected["labels"]
        torch.testing.assert_close(scores, torch.tensor(expected["scores"]), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(boxes, torch.tensor(expected["boxes"]), rtol=1e-4, atol=1e-2)


def with_resnet(task, shared_stage=None, out_features=(), **arguments):
    return new_model(task, shared_stage, out_features, name="resnet18", **arguments)


@pytest.mark.slow
def test_torchvision_and_timm_load_a_classifier_with_its_head(tmp_path):
    model = with_resnet("classification", image_size=32, resize=32)
    images = tv.normalize(pixels(photo(32, 32)), model.task.mean, model.task.std)
    expected = list(model.predict(photo(32, 32))["probabilities"].values())
    theirs = torchvision.models.resnet18(num_classes=3).eval()
    theirs.load_state_dict(torch.load(model.export(tmp_path / "model.pth").path, weights_only=True))
    model.export(tmp_path / "model")
    timms = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    for network in (theirs, timms):
        with torch.no_grad():
            assert network(images).softmax(1)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert timms.pretrained_cfg["label_names"] == CLASSES and timms.pretrained_cfg["crop_pct"] == 1.0
    assert list(timm.data.resolve_model_data_config(timms)["input_size"]) == [3, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize("pyramid", [False, True])
def test_torchvision_loads_a_detector(pyramid, tmp_path):
    maps, sizes = (("c3", "c4", "c5"), ((8,), (16,), (32,), (64,))) if pyramid else ((), ((16, 32),))
    more = {"fpn_channels": 8} if pyramid else {}
    stage = None if pyramid else "c4"
    anchors = [size for level in sizes for size in level]
    model = with_resnet("faster_rcnn", stage, maps, **DETECTOR, max_size=128, anchor_sizes=anchors, **more)
    body = torchvision.models.resnet18()
    if pyramid:
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        backbone = BackboneWithFPN(body, layers, [128, 256, 512], 8)
        names = ["0", "1", "2"]
    else:
        backbone = torchvision.models._utils.IntermediateLayerGetter(body, {"layer3": "0"})
        backbone.out_channels, names = 256, ["0"]
    align = MultiScaleRoIAlign(names, 7, 1)
    network = FasterRCNN(
        backbone,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=align,
        box_head=TwoMLPHead(backbone.out_channels * 49, 16),
        box_predictor=FastRCNNPredictor(16, 4),
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=50,
        box_score_thresh=0.0,
    ).eval()
    network.load_state_dict(torch.load(model.export(tmp_path / "model.pth").path, weights_only=True))
    align.scales = model.task.roi_heads.box_roi_pool.scales  # which torchvision guesses from the first batch
    align.map_levels = model.task.roi_heads.box_roi_pool.map_levels
    expected = model.predict(photo(96, 64), threshold=0.0)
    with torch.no_grad():
        outputs = network([pixels(photo(96, 64))[0]])[0]
    assert [CLASSES[label - 1] for label in outputs["labels"].tolist()] == expected["labels"]
    torch.testing.assert_close(outputs["boxes"], torch.tensor(expected["boxes"]), rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_detectron2s_anchors_and_classes_are_in_its_order(tmp_path):
    anchors = {"anchor_sizes": [16, 32, 64], "anchor_ratios": [0.5, 2.0]}
    model = with_resnet("faster_rcnn", "c4", **DETECTOR, max_size=128, **anchors)
    state = read_file(model.export(tmp_path / "model.pkl").path)["model"]
    ours = model.task.state_dict()
    # DefaultAnchorGenerator.generate_cell_anchors
    theirs = [(math.sqrt(s * s / r), r * math.sqrt(s * s / r)) for s in (16, 32, 64) for r in (0.5, 2.0)]
    cells = model.task.rpn.anchor_generator.cell_anchors[0][anchor_order(3, 2)]
    torch.testing.assert_close((cells[:, 2:] - cells[:, :2]), torch.tensor(theirs), atol=2, rtol=0)  # it rounds
    logits, deltas = (ours[f"rpn.head.{name}.weight"][:, :, 0, 0] for name in ("cls_logits", "bbox_pred"))
    rpn = "proposal_generator.rpn_head"
    for place, index in enumerate([0, 3, 1, 4, 2, 5]):
        assert torch.equal(state[f"{rpn}.objectness_logits.weight"][place, :, 0, 0], logits[index])
        theirs = state[f"{rpn}.anchor_deltas.weight"][4 * place : 4 * place + 4, :, 0, 0]
        assert torch.equal(theirs, deltas[4 * index : 4 * index + 4])
    scores, boxes = (ours[f"roi_heads.box_predictor.{name}.bias"] for name in ("cls_score", "bbox_pred"))
    assert torch.equal(state["roi_heads.box_predictor.cls_score.bias"], scores[[1, 2, 3, 0]])
    assert torch.equal(state["roi_heads.box_predictor.bbox_pred.bias"], boxes[4:])
    assert {"backbone.stem.conv1.norm.weight", "backbone.res4.1.conv2.weight", "roi_heads.box_head.fc2.bias"} <= set(
        state
    )
    more = {"fpn_channels": 8, "anchor_sizes": [8, 16, 32, 64]}
    model = with_resnet("faster_rcnn", None, ("c3", "c4", "c5"), **DETECTOR, max_size=128, **more)
    state = read_file(model.export(tmp_path / "fpn.pkl").path)["model"]
    assert torch.equal(state["backbone.fpn_lateral4.weight"], model.task.fpn.inner_blocks[1][0].weight.detach())
    assert torch.equal(state["backbone.fpn_output5.bias"], model.task.fpn.layer_blocks[2][0].bias.detach())
    assert "backbone.bottom_up.res5.0.shortcut.norm.weight" in state


def test_a_target_without_this_model_is_refused(tmp_path):
    model = new_model(image_size=32)
    with pytest.raises(ZooError, match="Targets: onnx, export, torchvision, detectron2, timm"):
        model.export(tmp_path / "model.xyz")
    with pytest.raises(ZooError, match="not a ResNet|has no network|no ResNet with the blocks"):
        model.export(tmp_path / "model.pth")
    with pytest.raises(BisslZooError, match="missing: "):
        new_model(shared_stage="c3", image_size=32).export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
