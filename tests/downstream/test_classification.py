import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog", "eel"]


def build(stage="c4", **kwargs):
    torch.manual_seed(0)
    trunk, _ = build_backbone(name="test_resnet").split(stage)
    return trunk, build_task(name="classification", backbone=trunk, classes=CLASSES, **kwargs)


def test_logits_are_a_linear_layer_on_the_pooled_map():
    trunk, task = build()
    trunk.eval()
    task.eval()
    images = torch.randn(5, 3, 32, 32)
    logits = task.predict(trunk, images)
    with torch.no_grad():
        pooled = trunk(images)["c4"].flatten(2).mean(dim=2)
        expected = pooled @ task.linear.weight.T + task.linear.bias
    assert logits.shape == (5, 3) and not logits.requires_grad
    torch.testing.assert_close(logits, expected)


def test_loss_is_the_mean_cross_entropy():
    trunk, task = build()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 1])
    losses = task.losses(trunk, (images, labels))
    trunk_again, task_again = build()
    with torch.no_grad():
        probabilities = task_again._logits(trunk_again, images).softmax(dim=1)
    assert list(losses) == ["cross_entropy"]
    torch.testing.assert_close(losses["cross_entropy"].detach(), -probabilities[range(4), labels].log().mean())
    losses["cross_entropy"].backward()
    assert all(p.grad is not None for p in [*trunk.parameters(), *task.parameters()])


@pytest.mark.parametrize("train", [True, False])
def test_samples_are_normalised_squares_with_their_label(train):
    _, task = build(image_size=24, mean=[0.5] * 3, std=[0.25] * 3)
    image, label = task.transform(train)(Image.new("RGB", (50, 40), (255, 0, 51)), 2)
    assert image.shape == (3, 24, 24) and image.dtype == torch.float32 and label == 2
    torch.testing.assert_close(image.mean(dim=(1, 2)), torch.tensor([2.0, -2.0, -1.2]), rtol=1e-5, atol=1e-5)


def test_the_test_crop_is_central_and_always_the_same():
    _, task = build(image_size=16, resize=32, mean=[0.0] * 3, std=[1.0] * 3)
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[8:24, 24:40] = 255
    transform = task.transform(train=False)
    image, _ = transform(Image.fromarray(pixels), 0)
    assert (image == 1).all() and torch.equal(image, transform(Image.fromarray(pixels), 0)[0])


@pytest.mark.parametrize("kind", ["classification", "multilabel_classification"])
def test_crops_have_the_aspect_ratio_and_the_interpolation(kind):
    options = {"image_size": 16, "aspect_ratio": [0.5, 1.0], "interpolation": "bilinear", "resize": 18}
    task = build_task(name=kind, backbone=build()[0], classes=CLASSES, **options)
    (_, crop, *_), (_, resize, *_) = (task.transform(train).transform.transforms for train in (True, False))
    assert crop.ratio == (0.5, 1.0) and resize.size == [18]
    assert crop.interpolation == resize.interpolation == InterpolationMode.BILINEAR
    torch.manual_seed(0)
    shapes = [crop.make_params([torch.zeros(3, 60, 60)]) for _ in range(50)]
    ratios = [shape["width"] / shape["height"] for shape in shapes]
    assert 0.45 < min(ratios) < 0.6 and 0.9 < max(ratios) <= 1.05  # sides are whole pixels
