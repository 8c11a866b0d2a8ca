"""Views made by workers, and views of which the colours are changed in batch on the device."""

import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from bissl_zoo.data import views as views_module
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.data.samples import first_samples, to_device
from bissl_zoo.data.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Views,
    in_batch,
    masked_view,
    multi_crop,
    two_parts,
    two_views,
)
from bissl_zoo.engine.build import ViewsOnly, Weights, build_pretext, pretext_batches
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.stages import Pretrain
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


@pytest.mark.parametrize("size", [16, 224])
def test_views_are_two_normalised_squares(size):
    views = two_views(size=size)(noise())
    assert len(views) == 2
    assert all(view.shape == (3, size, size) and view.dtype == torch.float32 for view in views)
    assert not torch.equal(*views)


def test_a_seed_draws_the_same_two_views_as_earlier_versions():
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


@pytest.mark.parametrize("views", [two_views(size=16), multi_crop(size=16, local_size=8), masked_view(size=64)])
def test_views_travel_to_spawned_workers(views):
    image = noise()
    copy = pickle.loads(pickle.dumps(views))
    drawn = []
    for transform in (views, copy):
        torch.manual_seed(0)
        drawn.append(transform(image))
    assert all(torch.equal(here, there) for here, there in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "cells", "hidden"),
    [(192, 32, 0.6, 6, 22), (160, 32, 0.6, 5, 15), (64, 16, 0.5, 4, 8)],
)
def test_a_mask_hides_the_given_fraction_rounded_up(size, patch, ratio, cells, hidden):
    view, mask = masked_view(size=size, mask_patch=patch, mask_ratio=ratio)(noise())
    assert view.shape == (3, size, size) and view.dtype == torch.float32
    assert mask.shape == (cells, cells) and mask.dtype == torch.bool and mask.sum() == hidden


def test_masks_differ_and_hide_every_cell_equally_often():
    views, image = masked_view(size=16, mask_patch=4), Image.new("RGB", (16, 16))
    drawn = []
    for seed in (0, 0):
        torch.manual_seed(seed)
        drawn.append(torch.stack([views(image)[1] for _ in range(500)]))
    assert torch.equal(*drawn)
    often = drawn[0].float().mean(dim=0)
    assert (often - 10 / 16).abs().max() < 0.09  # four standard errors of 0.022
    assert len({tuple(mask.flatten().tolist()) for mask in drawn[0]}) > 400


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


# in batch, on the device

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


@pytest.fixture(scope="module")
def photographs():
    return [Image.fromarray(pixels).resize((72, 48)) for pixels in load_sample_images().images]


@pytest.fixture(scope="module")
def images(photographs):
    """Photographs, noise, and the colours in which hue and saturation have corners: `(N, 3, 24, 24)` of uint8."""
    crops = [reference.pil_to_tensor(photo)[:, :24, 20:44] for photo in photographs]
    noise = torch.randint(0, 256, (6, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    levels = torch.tensor([0, 1, 127, 128, 255])
    colours = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).T.repeat(1, 5)[:, :576].view(3, 24, 24)
    return torch.stack([*crops, *noise, colours, torch.zeros_like(colours), torch.full_like(colours, 255)])


def assert_within_a_level(batch, expected):
    """Nearly all pixels are equal; the others, where a product is rounded otherwise, differ by 1 of 255."""
    difference = (batch.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0, 2.5), ("contrast", 0, 2.5), ("saturation", 0, 2.5), ("hue", -0.5, 0.5)],
)
def test_each_image_is_adjusted_by_its_own_amount_as_torchvision_adjusts_it(images, device, name, low, high):
    amounts = torch.linspace(low, high, len(images))
    adjusted = getattr(views_module, f"adjust_{name}")(images.to(device), amounts.to(device))
    adjust = getattr(reference, f"adjust_{name}")
    expected = [adjust(image, float(amount)) for image, amount in zip(images, amounts, strict=True)]
    assert adjusted.dtype == torch.uint8
    assert_within_a_level(adjusted, torch.stack(expected))
    floats = getattr(views_module, f"adjust_{name}")(images.to(device) / 255, amounts.to(device)).cpu()
    expected = [adjust(image / 255, float(amount)) for image, amount in zip(images, amounts, strict=True)]
    torch.testing.assert_close(floats, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel_size", [(3, 3), (9, 9), (5, 3)])
def test_each_image_is_blurred_by_its_own_sigma_as_torchvision_blurs_it(images, device, kernel_size):
    sigma = torch.linspace(0.1, 2, len(images))
    blurred = views_module.gaussian_blur(images.to(device), kernel_size, sigma.to(device))
    expected = [
        reference.gaussian_blur(image, list(kernel_size), [float(s)] * 2)
        for image, s in zip(images, sigma, strict=True)
    ]
    assert_within_a_level(blurred, torch.stack(expected))


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (v2.RandomHorizontalFlip, reference.horizontal_flip),
        (v2.RandomGrayscale, lambda images: reference.rgb_to_grayscale(images, 3)),
        (lambda p: v2.RandomSolarize(128, p), lambda images: reference.solarize(images, 128)),
        (lambda p: v2.RandomApply([v2.RandomHorizontalFlip(1.0)], p), reference.horizontal_flip),
    ],
    ids=["flip", "grayscale", "solarize", "apply"],
)
def test_a_probability_is_each_images_own_and_0_and_1_are_never_and_always(images, make, step):
    changed = step(images)
    assert torch.equal(in_batch(make(0.0), images), images)
    assert torch.equal(in_batch(make(1.0), images), changed)
    many, there = images[:1].expand(400, -1, -1, -1), images[:1].clone()
    torch.manual_seed(0)
    drawn = in_batch(make(0.3), many)
    hit = (drawn == changed[0]).flatten(1).all(dim=1)
    assert torch.equal(drawn[~hit], many[~hit])
    assert 0.2 < hit.float().mean() < 0.4  # four standard errors of 0.023
    assert torch.equal(images[:1], there)  # what was given is left as it was


def test_the_order_of_the_jitter_is_each_images_own_and_all_orders_are_equally_likely(images):
    amounts = {"brightness": 1.6, "contrast": 0.5, "saturation": 1.9, "hue": 0.1}
    results = []
    for order in permutations(amounts):
        image = images[1]
        for name in order:
            image = getattr(reference, f"adjust_{name}")(image, amounts[name])
        results.append(image.float())
    results = torch.stack(results).flatten(1)
    torch.manual_seed(0)
    transform = v2.ColorJitter(*[(amount, amount) for amount in amounts.values()])
    drawn = in_batch(transform, images[1].expand(24 * 40, -1, -1, -1)).float().flatten(1)
    distances = torch.cdist(drawn, results, p=float("inf"))
    assert distances.min(dim=1).values.max() <= 4  # a level of each of the four steps
    counts = torch.bincount(torch.cdist(drawn, results).argmin(dim=1), minlength=24)
    assert (counts - 40).abs().max() < 5 * 40**0.5


def statistics(views):
    """Statistics of views `(N, 3, S, S)` in [0, 1]: colours, contrast, sharpness, and which steps were applied.

    Squares are included, so that means over many views also measure the spread.
    """
    means, stds = views.mean(dim=(2, 3)), views.std(dim=(2, 3))
    gray = views.mean(dim=1)
    centred = gray - gray.mean(dim=(1, 2), keepdim=True)
    spread = centred.square().mean(dim=(1, 2)) + 1e-4  # a crop of the dark may have one colour only
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean(dim=(1, 2)) / spread
    half = views.shape[-1] // 2
    sides = gray[..., :half].mean(dim=(1, 2)) - gray[..., half:].mean(dim=(1, 2))
    grayscale = (views[:, 0] == views[:, 2]).flatten(1).all(dim=1).float()
    solarized = (views.flatten(1).max(dim=1).values < 0.5).float()
    of_one = torch.stack([neighbours, sides, grayscale, solarized, means[:, 0] - means[:, 2]], dim=1)
    every = torch.cat([means, stds, of_one], dim=1)
    return torch.cat([every, every.square()], dim=1)


def assert_alike(here, there):
    """Compare means of two sets of views within 4.5 standard errors, and half a level of 255 for rounding."""
    one, other = statistics(here), statistics(there)
    error = (one.var(dim=0) / len(one) + other.var(dim=0) / len(other)).sqrt()
    excess = (one.mean(dim=0) - other.mean(dim=0)).abs() - 4.5 * error
    assert excess.max() < 0.5 / 255, excess


@pytest.mark.slow
@pytest.mark.parametrize(
    "views",
    [
        two_views(size=24, mean=(0.0,) * 3, std=(1.0,) * 3),
        multi_crop(size=24, local_size=16, local_crops=1, mean=(0.0,) * 3, std=(1.0,) * 3),
        masked_view(size=32, mask_patch=8, mean=(0.0,) * 3, std=(1.0,) * 3),
    ],
    ids=["two_views", "multi_crop", "masked_view"],
)
def test_whole_views_are_distributed_as_in_the_workers(photographs, views):
    torch.manual_seed(0)
    here = default_collate([views(photo) for photo in photographs * 150])
    crops = default_collate([views.crops(photo) for photo in photographs * 200])
    there = views.on_device(crops)
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
        if one.dtype == torch.float32:
            assert_alike(other, one)


def test_steps_before_the_first_batched_one_run_in_the_workers(photographs):
    views = Views(
        [v2.Compose([v2.RandomCrop(24), v2.RandomRotation(30), v2.Grayscale(3), v2.RandomSolarize(128, 1.0)])]
    )
    crop = views.crops(photographs[0])[0]
    assert torch.equal(crop[0], crop[1])
    assert torch.equal(views.on_device([crop[None]])[0][0], reference.solarize(crop, 128))


def test_a_step_without_a_batched_form_is_refused_until_it_is_registered(photographs):
    class Inverted(v2.Transform):
        def transform(self, inpt, params):
            return 255 - inpt

    views = Views([v2.Compose([v2.RandomCrop(24), v2.RandomApply([v2.ColorJitter(0.4), Inverted()], 1.0)])])
    with pytest.raises(ConfigError, match="Inverted cannot be done in batch"):
        two_parts(views)
    with pytest.raises(ConfigError, match="Inverted cannot be done in batch"):
        in_batch(Inverted(), torch.zeros(1, 3, 4, 4))
    in_batch.register(Inverted, lambda transform, images: 255 - images)
    crops, on_device = two_parts(Views([v2.Compose([v2.RandomCrop(24), Inverted()])]))
    crop = crops(photographs[0])[0]
    assert torch.equal(on_device([crop[None]])[0][0], 255 - crop)


def own_augmentation(image):
    return two_views(size=32)(image)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (own_augmentation, "the augmentation 'own_augmentation' does not come in two parts.*crops.*on_device"),
        (Views([v2.RandomHorizontalFlip()]), "consists of RandomHorizontalFlip.*v2.RandomResizedCrop"),
        (Views([own_augmentation]), "consists of function"),
    ],
)
def test_an_augmentation_without_two_parts_is_refused(views, message):
    with pytest.raises(ConfigError, match=message):
        two_parts(views)


@pytest.mark.slow
def test_a_stage_trains_on_such_views_and_a_seed_draws_the_same(tiny_config, at_scenes):
    context = open_context(tiny_config(**{"+dataloader.pretext.augment_on": "device"}), "test")
    left = []
    for _ in range(2):
        trainer = Pretrain().build(context, Weights())
        trainer.train()
        left.append(trainer.result())
        trainer.close()
    assert all(torch.equal(value, left[1].backbone[key]) for key, value in left[0].backbone.items())
    _, pretext = build_pretext(context.cfg, Weights(), context.device)
    drawn = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        batches = pretext_batches(context, pretext, seed=0)
        drawn.append(torch.stack(tuple(next(batches))))
        batches.close()
    assert drawn[0].shape == (2, 8, 3, 32, 32) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
