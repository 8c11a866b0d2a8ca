import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD, two_views

QUIET = dict(
    crop_scale=(1.0, 1.0),
    aspect_ratio=(1.0, 1.0),
    jitter_probability=0.0,
    grayscale_probability=0.0,
    flip_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


def noise(width=80, height=60):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def gradient(size=32):
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (size, 1))] * 3, axis=-1))


@pytest.mark.parametrize("size", [16, 32, 96, 224])
def test_views_are_two_normalised_squares(size):
    views = two_views(size=size)(noise())
    assert len(views) == 2
    assert all(view.shape == (3, size, size) and view.dtype == torch.float32 for view in views)
    assert not torch.equal(*views)


def test_the_same_seed_draws_the_same_views():
    views, image = two_views(size=32), noise()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(torch.stack(views(image)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pixels_are_normalised_per_channel():
    quiet = {**QUIET, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for view in two_views(size=8, **quiet)(Image.new("RGB", (8, 8), (255, 0, 51))):
        expected = [(p - m) / s for p, m, s in zip((1.0, 0.0, 0.2), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
        torch.testing.assert_close(view.mean(dim=(1, 2)), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_only_the_second_view_is_solarized():
    image = gradient()
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    first, second = two_views(size=32, **{**QUIET, "solarize_probability": (0.0, 1.0)})(image)
    torch.testing.assert_close(first, expected / 255)
    torch.testing.assert_close(second, torch.where(expected >= 128, 255 - expected, expected) / 255)


def test_the_defaults_blur_the_first_view_always_and_solarize_the_second_at_times():
    # a white image shows solarization alone; a checkerboard shows blur alone
    plain = {key: QUIET[key] for key in ("jitter_probability", "grayscale_probability", "mean", "std")}
    views, white = two_views(size=16, **plain), Image.new("RGB", (16, 16), "white")
    torch.manual_seed(0)
    dark = torch.tensor([[view.mean() < 0.5 for view in views(white)] for _ in range(300)]).float().mean(dim=0)
    assert dark[0] == 0
    assert 0.12 < dark[1] < 0.28  # 0.2 with a standard error of 0.023
    still = {key: QUIET[key] for key in QUIET if key != "blur_probability"}
    views, board = (
        two_views(size=16, blur_sigma=(1.0, 1.0), **still),
        Image.fromarray(np.kron([[0, 255] * 4, [255, 0] * 4] * 4, np.ones((2, 2))).astype(np.uint8)).convert("RGB"),
    )
    blurred = torch.tensor([[view.std() < 0.4 for view in views(board)] for _ in range(300)]).float().mean(dim=0)
    assert blurred[0] == 1
    assert 0.04 < blurred[1] < 0.17  # 0.1 with a standard error of 0.017


def test_flip_crop_and_jitter_can_be_switched_off_and_on():
    image = gradient()
    kept, flipped = (
        two_views(size=32, **QUIET)(image)[0],
        two_views(size=32, **{**QUIET, "flip_probability": 1.0})(image)[0],
    )
    assert torch.equal(flipped, kept.flip(-1))
    gray = two_views(size=32, **{**QUIET, "grayscale_probability": 1.0})(noise())[0]
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[1], gray[2])


def test_views_travel_to_spawned_workers():
    views, image = two_views(size=16), noise()
    copy = pickle.loads(pickle.dumps(views))
    torch.manual_seed(0)
    here = torch.stack(views(image))
    torch.manual_seed(0)
    assert torch.equal(torch.stack(copy(image)), here)
