import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.data.batches import first_samples, to_device
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD, masked_view, multi_crop, two_views
from bissl_zoo.engine.build import ViewsOnly
from bissl_zoo.errors import ConfigError

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


def test_a_seed_draws_the_two_views_it_always_drew():
    views, image = two_views(size=32), noise()
    torch.manual_seed(0)
    drawn = [view for _ in range(3) for view in views(image)]
    means = [0.45617, -0.37691, -0.44844, 0.39867, -0.30823, 0.15834]
    pixels = [[0.4337, 0.5728, 0.7925], [-0.2342, -0.1099, 0.1128], [0.0227, -0.1975, -0.1312]]
    # a version of torchvision may round a resized pixel to the next of 255 values
    assert [view.mean().item() for view in drawn] == pytest.approx(means, abs=2e-3)
    for view, pixel in zip(drawn, pixels, strict=False):
        assert view[:, 5, 7].tolist() == pytest.approx(pixel, abs=0.02)


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


@pytest.mark.parametrize("views", [two_views(size=16), multi_crop(size=16, local_size=8), masked_view(size=64)])
def test_views_travel_to_spawned_workers(views):
    image = noise()
    copy = pickle.loads(pickle.dumps(views))
    drawn = []
    for transform in (views, copy):
        torch.manual_seed(0)
        drawn.append(transform(image))
    assert all(torch.equal(here, there) for here, there in zip(*drawn, strict=True))


def test_multi_crop_is_two_large_crops_and_several_small_ones():
    assert [view.shape[1:] for view in multi_crop()(noise())] == [(96, 96)] * 2 + [(48, 48)] * 8
    views = multi_crop(size=32, local_size=16, local_crops=3)(noise())
    assert [view.shape for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(view.dtype == torch.float32 for view in views)
    assert not torch.equal(*views[:2]) and not torch.equal(*views[2:4])


@pytest.mark.slow
def test_blur_and_solarization_of_crops_are_dinos():
    plain = {key: QUIET[key] for key in ("jitter_probability", "grayscale_probability", "mean", "std")}
    sizes = dict(size=16, local_size=16, local_crops=2)
    views, white = multi_crop(**sizes, **plain), Image.new("RGB", (16, 16), "white")
    torch.manual_seed(0)
    dark = torch.tensor([[view.mean() < 0.5 for view in views(white)] for _ in range(300)]).float().mean(dim=0)
    assert dark[0] == 0 and not dark[2:].any()
    assert 0.12 < dark[1] < 0.28  # 0.2 with a standard error of 0.023
    still = plain | dict(crop_scale=(1.0, 1.0), local_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0), flip_probability=0.0)
    views = multi_crop(**sizes, **still, blur_sigma=(1.0, 1.0), solarize_probability=(0.0, 0.0, 0.0))
    board = np.kron([[0, 255] * 4, [255, 0] * 4] * 4, np.ones((2, 2))).astype(np.uint8)
    board = Image.fromarray(board).convert("RGB")
    blurred = torch.tensor([[view.std() < 0.4 for view in views(board)] for _ in range(300)]).float().mean(dim=0)
    assert blurred[0] == 1
    assert 0.04 < blurred[1] < 0.17  # 0.1 with a standard error of 0.017
    assert all(0.4 < share < 0.6 for share in blurred[2:])  # 0.5 with a standard error of 0.029


def test_small_crops_show_less_of_the_image_than_large_ones():
    quiet = {key: value for key, value in QUIET.items() if "blur" not in key and "solarize" not in key}
    quiet |= dict(crop_scale=(0.4, 1.0), blur_probability=(0.0,) * 3, solarize_probability=(0.0,) * 3)
    views, image = multi_crop(size=16, local_size=16, local_crops=1, **quiet), gradient(64)
    torch.manual_seed(0)
    # the range of a horizontal ramp is the crop's width; crops are square here, and the square of it their area
    areas = torch.tensor([[(view.max() - view.min()) ** 2 for view in views(image)] for _ in range(200)])
    large, small = areas[:, :2].flatten(), areas[:, 2]
    assert 0.35 < large.min() < 0.5 and 0.9 < large.max() <= 1
    assert 0.02 < small.min() < 0.08 and 0.33 < small.max() < 0.42


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "cells", "hidden"),
    [(192, 32, 0.6, 6, 22), (224, 32, 0.6, 7, 30), (160, 32, 0.6, 5, 15), (64, 16, 0.5, 4, 8), (96, 32, 0.6, 3, 6)],
)
def test_a_mask_hides_the_given_fraction_rounded_up(size, patch, ratio, cells, hidden):
    view, mask = masked_view(size=size, mask_patch=patch, mask_ratio=ratio)(noise())
    assert view.shape == (3, size, size) and view.dtype == torch.float32
    assert mask.shape == (cells, cells) and mask.dtype == torch.bool and mask.sum() == hidden


def test_masks_differ_and_hide_every_cell_equally_often():
    views, image = masked_view(size=64, mask_patch=16), Image.new("RGB", (64, 64))
    drawn = []
    for seed in (0, 0):
        torch.manual_seed(seed)
        drawn.append(torch.stack([views(image)[1] for _ in range(500)]))
    assert torch.equal(*drawn)
    often = drawn[0].float().mean(dim=0)
    assert (often - 10 / 16).abs().max() < 0.09  # four standard errors of 0.022
    assert len({tuple(mask.flatten().tolist()) for mask in drawn[0]}) > 400


def test_the_view_of_a_mask_is_cropped_and_flipped_and_no_more():
    image = gradient()
    still = dict(crop_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0), mean=(0.0,) * 3, std=(1.0,) * 3, mask_patch=8)
    kept, flipped = (masked_view(size=32, flip_probability=p, **still)(image)[0] for p in (0.0, 1.0))
    torch.testing.assert_close(kept, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    assert torch.equal(flipped, kept.flip(-1))


def test_a_mask_that_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="size=100 is not a multiple of mask_patch=32"):
        masked_view(size=100)
    for size, ratio, hidden in ((32, 0.6, "1 of 1"), (64, 0.0, "0 of 4"), (64, 1.0, "4 of 4")):
        with pytest.raises(ConfigError, match=f"mask_ratio={ratio} hides {hidden} squares of 32 pixels"):
            masked_view(size=size, mask_ratio=ratio)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40), (30 * index, 0, 0)), 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_views_of_several_sizes_and_masks_make_batches(workers):
    loaders = [
        build_train_loader(Images(), batch_size=4, transform=ViewsOnly(views), num_workers=workers)
        for views in (multi_crop(size=32, local_size=16, local_crops=2), masked_view(size=64))
    ]
    crops, masked = (to_device(next(iter(loader)), torch.device("cpu")) for loader in loaders)
    assert [tuple(view.shape) for view in crops] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert [tuple(part.shape) for part in masked] == [(4, 3, 64, 64), (4, 2, 2)]
    assert masked[1].dtype == torch.bool and (masked[1].sum(dim=(1, 2)) == 3).all()
    assert [len(view) for view in first_samples(crops, 2)] == [2] * 4
