"""The second half of a view: what torchvision does to one crop after the other, done to a batch of them.

Draws come from torch's generator of the batch's device, and each image has its own. Pixels keep their type from step to
step, as torchvision's do, so that both round alike.
"""

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from bissl_zoo.errors import ConfigError


@singledispatch
def in_batch(transform: Any, images: Tensor) -> Tensor:
    """A transform of torchvision on images `(N, 3, H, W)`, with draws of its own for each of them.

    `in_batch.register` teaches it one that it does not know, as :func:`functools.singledispatch` has it.

    Raises:
        ConfigError: it does not know this one.
    """
    raise _unknown(transform)


def halves(transform: Any) -> tuple[v2.Compose, v2.Compose]:
    """A composition cut before its first step that `in_batch` knows: what is done image by image, and what in batch.

    Raises:
        ConfigError: one of the halves would be empty, or a step of the second is unknown to `in_batch`.
    """
    steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
    cut = next((number for number, step in enumerate(steps) if _is_known(step)), len(steps))
    if cut in (0, len(steps)):
        raise ConfigError(
            "augment_on=device takes views that are cut to one size first and coloured then; this one is made by "
            f"{', '.join(type(step).__name__ for step in steps)}. Make it a torchvision v2.Compose of a crop, such as "
            "v2.RandomResizedCrop, and what is done to it, or take augment_on=workers."
        )
    _refuse_unknown(steps[cut:])
    return v2.Compose(steps[:cut]), v2.Compose(steps[cut:])


def two_parts(views: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """What of an augmentation is done in the loader's workers, image by image, and what on the device, in batch.

    Raises:
        ConfigError: the augmentation does not come in two parts.
    """
    if not hasattr(views, "crops") or not hasattr(views, "on_device"):
        name = getattr(views, "__name__", type(views).__name__)
        raise ConfigError(
            f"augment_on=device: the augmentation '{name}' does not come in two parts. Make it a "
            "bissl_zoo.data.views.Views, or give it `crops`, a transform of one image to tensors of one size each, and "
            "`on_device(batch)`, which makes the views of these; or take augment_on=workers."
        )
    return views.crops, views.on_device


def _is_known(step: Any) -> bool:
    return in_batch.dispatch(type(step)) is not in_batch.dispatch(object)


def _refuse_unknown(steps: Sequence[Any]) -> None:
    for step in steps:
        if not _is_known(step):
            raise _unknown(step)
        if isinstance(step, (v2.Compose, v2.RandomApply)):
            _refuse_unknown(step.transforms)


def _unknown(step: Any) -> ConfigError:
    return ConfigError(
        f"augment_on=device: {type(step).__name__} cannot be done in batch. Register a function of it and of images "
        "(N, 3, H, W) with @bissl_zoo.data.device_views.in_batch.register, or take augment_on=workers."
    )


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Images `(N, 3, H, W)`, each multiplied by its factor of `(N,)`."""
    return _blend(images, 0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Images `(N, 3, H, W)`, blended with the mean of their gray values; 0 leaves that alone."""
    return _blend(images, pixels.rgb_to_grayscale(images).float().mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Images `(N, 3, H, W)`, blended with their gray values; 0 leaves these alone."""
    return _blend(images, pixels.rgb_to_grayscale(images), factor)


def _blend(images: Tensor, others: Tensor | int, ratio: Tensor) -> Tensor:
    ratio = ratio.view(-1, 1, 1, 1)
    white = 1 if images.is_floating_point() else 255
    return (images * ratio + others * (1 - ratio)).clamp_(0, white).to(images.dtype)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images `(N, 3, H, W)`, their hues turned by a shift of `(N,)`, in circles from -0.5 to 0.5."""
    r, g, b = rgb = pixels.to_dtype(images, torch.float32, scale=True).unbind(dim=1)
    low, high = torch.aminmax(torch.stack(rgb), dim=0)
    chroma = high - low
    divisor = chroma.masked_fill(chroma == 0, 1)  # gray has no hue, and keeps its value whatever hue it is given
    sixths = torch.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    sixths = torch.where(high == r, (g - b) / divisor, sixths) + 6 * shift.view(-1, 1, 1)
    # a channel is at full value within a sixth of the circle of its own hue, and falls by chroma over the next sixth
    distances = [(sixths + offset).remainder(6) for offset in (5, 3, 1)]
    turned = [high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in distances]
    return pixels.to_dtype(torch.stack(turned, dim=1), images.dtype, scale=True)


def gaussian_blur(images: Tensor, kernel_size: Sequence[int], sigma: Tensor) -> Tensor:
    """Images `(N, 3, H, W)`, each blurred with its own standard deviation of `(N,)`, borders reflected.

    Args:
        kernel_size: pixels of the kernel along the width and the height, odd.
    """
    count, channels = images.shape[:2]
    across, down = (side // 2 for side in kernel_size)
    padded = functional.pad(images.float(), (across, across, down, down), mode="reflect")
    # each channel of each image is a group of its own: one kernel per image
    blurred = padded.flatten(0, 1).unsqueeze(0)
    for reach, shape in ((across, (-1, 1, 1, kernel_size[0])), (down, (-1, 1, kernel_size[1], 1))):
        offsets = torch.arange(-reach, reach + 1, device=images.device)
        kernel = torch.softmax(-((offsets / sigma[:, None]) ** 2) / 2, dim=1)
        kernel = kernel.repeat_interleave(channels, dim=0).view(shape)
        blurred = functional.conv2d(blurred, kernel, groups=count * channels)
    if not images.is_floating_point():
        blurred.round_()
    return blurred.view(images.shape).to(images.dtype)


def _some(images: Tensor, probability: float, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The images, each of them changed by `function` with this probability."""
    return _those(images, torch.rand(len(images), device=images.device) < probability, function)


def _those(images: Tensor, chosen: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """The images, those chosen by `(N,)` of bool changed by `function`; parameters are `(N,)` too."""
    indices = chosen.nonzero().squeeze(1)
    if not len(indices):
        return images
    return images.index_copy(0, indices, function(*(tensor[indices] for tensor in (images, *parameters))))


def _uniform(images: Tensor, bounds: Sequence[float]) -> Tensor:
    return torch.empty(len(images), device=images.device).uniform_(*bounds)


@in_batch.register
def _(transform: v2.RandomApply, images: Tensor) -> Tensor:
    return _some(images, transform.p, lambda some: _all(transform.transforms, some))


@in_batch.register
def _(transform: v2.Compose, images: Tensor) -> Tensor:
    return _all(transform.transforms, images)


def _all(steps: Sequence[v2.Transform], images: Tensor) -> Tensor:
    for step in steps:
        images = in_batch(step, images)
    return images


@in_batch.register
def _(transform: v2.RandomHorizontalFlip, images: Tensor) -> Tensor:
    return _some(images, transform.p, pixels.horizontal_flip)


@in_batch.register
def _(transform: v2.ColorJitter, images: Tensor) -> Tensor:
    ranges = (transform.brightness, transform.contrast, transform.saturation, transform.hue)
    adjustments = [
        (adjust, _uniform(images, bounds))
        for adjust, bounds in zip(_ADJUSTMENTS, ranges, strict=True)
        if bounds is not None
    ]
    order = torch.rand(len(images), len(adjustments), device=images.device).argsort(dim=1)
    for turn in order.unbind(dim=1):
        for number, (adjust, amounts) in enumerate(adjustments):
            images = _those(images, turn == number, adjust, amounts)
    return images


_ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@in_batch.register
def _(transform: v2.RandomGrayscale, images: Tensor) -> Tensor:
    return _some(images, transform.p, lambda some: pixels.rgb_to_grayscale(some, num_output_channels=3))


@in_batch.register
def _(transform: v2.GaussianBlur, images: Tensor) -> Tensor:
    return gaussian_blur(images, transform.kernel_size, _uniform(images, transform.sigma))


@in_batch.register
def _(transform: v2.RandomSolarize, images: Tensor) -> Tensor:
    return _some(images, transform.p, lambda some: pixels.solarize(some, transform.threshold))


@in_batch.register(v2.ToDtype)
@in_batch.register(v2.Normalize)
def _(transform: v2.Transform, images: Tensor) -> Tensor:
    return transform(images)  # without a draw, the same for one image and for many
