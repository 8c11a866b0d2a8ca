"""Views finished in batch: each step is torchvision's, each image has its own draw, and views are as in the workers."""

from itertools import permutations

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from bissl_zoo.data import views as device_views
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.data.views import Views, in_batch, masked_view, multi_crop, two_parts, two_views
from bissl_zoo.engine.build import ViewsOnly, Weights, build_pretext, pretext_batches
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.stages import Pretrain
from bissl_zoo.errors import ConfigError

PLAIN = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
UNCROPPED = dict(crop_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0), **PLAIN)
STILL = dict(
    jitter_probability=0.0,
    grayscale_probability=0.0,
    flip_probability=0.0,
    blur_probability=(0.0, 0.0),
    solarize_probability=(0.0, 0.0),
)
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
    adjusted = getattr(device_views, f"adjust_{name}")(images.to(device), amounts.to(device))
    adjust = getattr(reference, f"adjust_{name}")
    expected = [adjust(image, float(amount)) for image, amount in zip(images, amounts, strict=True)]
    assert adjusted.dtype == torch.uint8
    assert_within_a_level(adjusted, torch.stack(expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel_size", [(3, 3), (9, 9), (5, 3)])
def test_each_image_is_blurred_by_its_own_sigma_as_torchvision_blurs_it(images, device, kernel_size):
    sigma = torch.linspace(0.1, 2, len(images))
    blurred = device_views.gaussian_blur(images.to(device), kernel_size, sigma.to(device))
    expected = [
        reference.gaussian_blur(image, list(kernel_size), [float(s)] * 2)
        for image, s in zip(images, sigma, strict=True)
    ]
    assert_within_a_level(blurred, torch.stack(expected))


def test_images_of_floats_stay_floats_as_torchvisions_do(images):
    floats, amounts = images / 255, torch.linspace(0.5, 1.5, len(images))
    steps = {
        "adjust_brightness": (device_views.adjust_brightness, 0),
        "adjust_contrast": (device_views.adjust_contrast, 0),
        "adjust_saturation": (device_views.adjust_saturation, 0),
        "adjust_hue": (device_views.adjust_hue, 1),
    }
    for name, (step, shift) in steps.items():
        expected = [getattr(reference, name)(i, float(a) - shift) for i, a in zip(floats, amounts, strict=True)]
        torch.testing.assert_close(step(floats, amounts - shift), torch.stack(expected), rtol=0, atol=1e-5)
    expected = [reference.gaussian_blur(i, [5, 5], [float(a)] * 2) for i, a in zip(floats, amounts, strict=True)]
    blurred = device_views.gaussian_blur(floats, (5, 5), amounts)
    torch.testing.assert_close(blurred, torch.stack(expected), rtol=0, atol=1e-5)


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


def test_equal_images_of_a_batch_become_different_views(photographs):
    torch.manual_seed(0)
    views = two_views(size=32, jitter_probability=1.0)
    crop = views.crops(photographs[0])[0]
    first, second = views.on_device([torch.stack([crop] * 8)] * 2)
    assert first.dtype == second.dtype == torch.float32 and first.shape == (8, 3, 32, 32)
    for drawn in (first, second):
        assert len({tuple(view.flatten().tolist()) for view in drawn}) == 8


def statistics(views):
    """Statistics of views `(N, 3, S, S)` in [0, 1]: colours, contrast, sharpness, and which steps were applied.

    Squares as well, so that means over many views tell how they spread.
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
    "changed",
    [
        dict(flip_probability=0.5),
        dict(jitter_probability=1.0, jitter=(0.6, 0.0, 0.0, 0.0)),
        dict(jitter_probability=1.0, jitter=(0.0, 0.6, 0.0, 0.0)),
        dict(jitter_probability=1.0, jitter=(0.0, 0.0, 0.9, 0.0)),
        dict(jitter_probability=1.0, jitter=(0.0, 0.0, 0.0, 0.4)),
        dict(jitter_probability=0.8, jitter=(0.4, 0.4, 0.2, 0.1)),
        dict(grayscale_probability=0.3),
        dict(blur_probability=(0.7, 0.0)),
        dict(solarize_probability=(0.3, 0.0)),
    ],
    ids=["flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize"],
)
def test_each_step_is_distributed_as_in_the_workers(photographs, changed):
    torch.manual_seed(0)
    for photo in photographs:
        views = two_views(size=24, **{**UNCROPPED, **STILL, **changed})
        here = torch.stack([views(photo)[0] for _ in range(250)])
        crops = views.crops(photo)[0].expand(500, -1, -1, -1)
        assert_alike(views.on_device([crops] * 2)[0], here)


@pytest.mark.slow
@pytest.mark.parametrize(
    "views",
    [
        two_views(size=24, **PLAIN),
        multi_crop(size=24, local_size=16, local_crops=1, **PLAIN),
        masked_view(size=32, mask_patch=8, **PLAIN),
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


def test_a_view_that_is_only_cropped_is_the_same_either_way(photographs):
    views = two_views(size=32, **STILL)
    torch.manual_seed(0)
    whole = views(photographs[0])[0]
    torch.manual_seed(0)
    crop = views.crops(photographs[0])[0]
    assert crop.dtype == torch.uint8 and crop.shape == (3, 32, 32)
    assert torch.equal(views.on_device([crop[None]] * 2)[0][0], whole)


def test_a_mask_comes_back_as_the_workers_drew_it(photographs):
    views = masked_view(size=64)
    torch.manual_seed(0)
    crops, masks = default_collate([views.crops(photo) for photo in photographs])
    assert crops.dtype == torch.uint8 and (masks.sum(dim=(1, 2)) == 3).all()
    images, same = views.on_device([crops, masks])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and torch.equal(same, masks)


def test_a_loader_gives_crops_of_several_sizes_as_bytes(photographs):
    views = multi_crop(size=32, local_size=16, local_crops=2)
    dataset = [(photo, 0) for photo in photographs]
    loader = build_train_loader(dataset, batch_size=2, transform=ViewsOnly(views.crops), augment_on="device")
    batch = next(iter(loader))
    assert all(crops.dtype == torch.uint8 for crops in batch)
    assert [tuple(view.shape) for view in views.on_device(batch)] == [(2, 3, 32, 32)] * 2 + [(2, 3, 16, 16)] * 2


def test_steps_before_the_first_that_is_known_are_left_to_the_workers(photographs):
    views = Views(
        [v2.Compose([v2.RandomCrop(24), v2.RandomRotation(30), v2.Grayscale(3), v2.RandomSolarize(128, 1.0)])]
    )
    crop = views.crops(photographs[0])[0]
    assert torch.equal(crop[0], crop[1])
    assert torch.equal(views.on_device([crop[None]])[0][0], reference.solarize(crop, 128))


def test_a_step_that_batches_do_not_know_is_refused_until_it_is_registered(photographs):
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


def on_device(tiny_config, **changed):
    return tiny_config(**{"+dataloader.pretext.augment_on": "device"}, **changed)


@pytest.mark.slow
def test_a_stage_trains_on_such_views_and_a_seed_draws_the_same(tiny_config, at_scenes):
    context = open_context(on_device(tiny_config), "test")
    left = []
    for _ in range(2):
        trainer = Pretrain().build(context, Weights())
        trainer.train()
        left.append(trainer.result())
        trainer.close()
    for one, other in ((left[0].backbone, left[1].backbone), (left[0].pretext, left[1].pretext)):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    _, pretext = build_pretext(context.cfg, Weights(), context.device)
    drawn = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        batches = pretext_batches(context, pretext, seed=0)
        drawn.append(torch.stack(tuple(next(batches))))
        batches.close()
    assert drawn[0].shape == (2, 8, 3, 32, 32) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_augment_on_accepts_workers_and_device_only(tiny, train_net):
    said = train_net("--dry-run", *tiny(), "+dataloader.pretext.augment_on=devise").message()
    assert "augment_on is 'devise'; accepted are workers and device. Did you mean 'device'?" in said
    assert train_net("--dry-run", *tiny(), "+dataloader.pretext.augment_on=device").status == 0
