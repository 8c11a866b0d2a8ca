"""Augmented views of an image, made by workers, or in two parts: crops by workers, the rest in batch on the device.

In batch, each image has its own random parameters, drawn from torch's generator of the device; torchvision's transforms
draw one set of parameters for a whole batch. Pixels keep their dtype from step to step, as in torchvision, so that both
round alike.
"""

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from bissl_zoo.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Views:
    """Apply several transforms to one image: PIL image -> tuple of `(3, S, S)` float32 views, normalised.

    S may differ from view to view; a batch is a sequence of tensors, one per view.
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        """Return the views of one image, each with its own random parameters."""
        image = pixels.pil_to_tensor(image)
        return tuple(transform(image) for transform in self.transforms)

    @property
    def crops(self) -> "Views":
        """The first part of each view: PIL image -> crops `(3, S, S)` uint8, with the geometry of the views.

        Raises:
            ConfigError: a transform cannot be split, see :func:`split_transform`.
        """
        return Views([split_transform(transform)[0] for transform in self.transforms])

    def on_device(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the views `(N, 3, S, S)` of a batch of `crops`, made on its device, with parameters per image."""
        transforms = zip(self.transforms, batch, strict=True)
        return tuple(in_batch(split_transform(transform)[1], crops) for transform, crops in transforms)


class MaskedView:
    """One transform and a random mask: PIL image -> view `(3, S, S)`, mask `(C, C)` bool, true for hidden cells.

    The mask is drawn with the sample, so that everything computed on a batch sees the same mask.

    Args:
        cells: C, the number of cells of the mask along a side.
        hidden: how many of its C * C cells are true.
    """

    def __init__(self, transform: Callable[[Any], Tensor], cells: int, hidden: int) -> None:
        self.transform, self.cells, self.hidden = transform, cells, hidden

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Return a view of one image, and a mask."""
        view = self.transform(pixels.pil_to_tensor(image))
        mask = torch.zeros(self.cells**2, dtype=torch.bool)
        mask[torch.randperm(len(mask))[: self.hidden]] = True
        return view, mask.view(self.cells, self.cells)

    @property
    def crops(self) -> "MaskedView":
        """The first part: PIL image -> crop `(3, S, S)` uint8 and the mask; see :attr:`Views.crops`."""
        return MaskedView(split_transform(self.transform)[0], self.cells, self.hidden)

    def on_device(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return views `(N, 3, S, S)` and masks of a batch of `crops`, made on its device."""
        crops, mask = batch
        return in_batch(split_transform(self.transform)[1], crops), mask


def two_views(
    size: int = 96,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    aspect_ratio: tuple[float, float] = (0.5, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    jitter_probability: float = 0.8,
    grayscale_probability: float = 0.2,
    flip_probability: float = 0.5,
    blur_probability: tuple[float, float] = (1.0, 0.1),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_probability: tuple[float, float] = (0.0, 0.2),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Views:
    """The asymmetric pair of views of BYOL (arXiv 2006.07733, appendix B), with BiSSL's numbers as defaults.

    Args:
        size: side of each view in pixels.
        crop_scale: area of the crop, as a fraction of the image.
        aspect_ratio: width over height of the crop.
        jitter: strengths for brightness, contrast, saturation and hue.
        blur_probability: for the first and the second view; likewise `solarize_probability`.
        blur_sigma: range of the Gaussian's standard deviation in pixels.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    """
    shared = (aspect_ratio, jitter, jitter_probability, grayscale_probability, flip_probability, blur_sigma, mean, std)
    probabilities = zip(blur_probability, solarize_probability, strict=True)
    return Views([_view(size, crop_scale, blur, solarize, *shared) for blur, solarize in probabilities])


def multi_crop(
    size: int = 96,
    local_size: int = 48,
    local_crops: int = 8,
    crop_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
    jitter_probability: float = 0.8,
    grayscale_probability: float = 0.2,
    flip_probability: float = 0.5,
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5),
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Views:
    """Two global crops, then `local_crops` small ones (DINO, arXiv 2104.14294, section 3.1, and its published code).

    The paper's sides are 224 and 96. Here 96 is BiSSL's, and 48 the multiple of 16 (for ViTs with
    patches of 16) above the same fraction of it (41).

    Args:
        size, local_size: side of the global and of the local crops in pixels.
        crop_scale, local_scale: area of the global and of the local crops, as a fraction of the image.
        blur_probability: for the first, the second global crop and each local one; likewise `solarize_probability`.
        aspect_ratio, jitter, blur_sigma, mean, std: as for :func:`two_views`.
    """
    shared = (aspect_ratio, jitter, jitter_probability, grayscale_probability, flip_probability, blur_sigma, mean, std)
    first, second, local = zip(blur_probability, solarize_probability, strict=True)
    crops = [_view(size, crop_scale, *probabilities, *shared) for probabilities in (first, second)]
    return Views(crops + [_view(local_size, local_scale, *local, *shared) for _ in range(local_crops)])


def masked_view(
    size: int = 192,
    crop_scale: tuple[float, float] = (0.67, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    mask_patch: int = 32,
    mask_ratio: float = 0.6,
    interpolation: str = "bilinear",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> MaskedView:
    """A lightly augmented crop and a mask over its patches (SimMIM, arXiv 2111.09886, section 4.1, and its code).

    Args:
        mask_patch: side in pixels of the masked squares; a multiple of the backbone's patch size.
        mask_ratio: fraction of the squares that are hidden; their number is rounded up.
        interpolation: "bilinear" or "bicubic".
        size, crop_scale, aspect_ratio, mean, std: as for :func:`two_views`.
    Raises:
        ConfigError: the squares do not tile the view, or all or none of them would be hidden.
    """
    if size % mask_patch:
        raise ConfigError(f"masked_view: size={size} is not a multiple of mask_patch={mask_patch}. Change one of them.")
    cells = size // mask_patch
    hidden = math.ceil(round(mask_ratio * cells**2, 6))  # 0.6 * 25 is a bit more than 15
    if not 0 < hidden < cells**2:
        raise ConfigError(
            f"masked_view: mask_ratio={mask_ratio} hides {hidden} of {cells**2} squares of {mask_patch} pixels; some "
            "must be hidden and some visible. Change mask_ratio, or use a smaller mask_patch."
        )
    crop = v2.RandomResizedCrop(size, tuple(crop_scale), tuple(aspect_ratio), v2.InterpolationMode(interpolation))
    return MaskedView(
        v2.Compose([crop, v2.RandomHorizontalFlip(flip_probability), *_normalized(mean, std)]), cells, hidden
    )


def _view(
    size: int,
    crop_scale: Sequence[float],
    blur: float,
    solarize: float,
    aspect_ratio: Sequence[float],
    jitter: Sequence[float],
    jitter_probability: float,
    grayscale_probability: float,
    flip_probability: float,
    blur_sigma: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> v2.Compose:
    """Return a strongly augmented crop, blurred and solarized with these probabilities."""
    # odd, about a tenth of the side as in SimCLR (arXiv 2002.05709, appendix A)
    kernel = max(3, size // 10 // 2 * 2 + 1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, tuple(crop_scale), tuple(aspect_ratio), v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(flip_probability),
            v2.RandomApply([v2.ColorJitter(*jitter)], jitter_probability),
            v2.RandomGrayscale(grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(kernel, tuple(blur_sigma))], blur),
            v2.RandomSolarize(128, solarize),
            *_normalized(mean, std),
        ]
    )


def _normalized(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


# transforms of a batch with parameters per image


@singledispatch
def in_batch(transform: Any, images: Tensor) -> Tensor:
    """Apply a transform of torchvision to images `(N, 3, H, W)` with random parameters per image.

    Extend it to other transforms with `in_batch.register`, see :func:`functools.singledispatch`.

    Raises:
        ConfigError: no function is registered for the transform.
    """
    raise _unknown(transform)


def split_transform(transform: Any) -> tuple[v2.Compose, v2.Compose]:
    """Split a composition before its first step that `in_batch` knows: the part for single images, and for batches.

    Raises:
        ConfigError: one of the parts would be empty, or `in_batch` lacks a step of the second.
    """
    steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
    cut = next((number for number, step in enumerate(steps) if _is_known(step)), len(steps))
    if cut in (0, len(steps)):
        raise ConfigError(
            "augment_on=device needs views that are first cropped to one size and then coloured; this one consists of "
            f"{', '.join(type(step).__name__ for step in steps)}. Make it a torchvision v2.Compose that begins with a "
            "crop, such as v2.RandomResizedCrop, or use augment_on=workers."
        )
    _check_known(steps[cut:])
    return v2.Compose(steps[:cut]), v2.Compose(steps[cut:])


def two_parts(views: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return the part of an augmentation for loader workers (one image), and the one for the device (a batch).

    Raises:
        ConfigError: the augmentation has no such parts.
    """
    if not hasattr(views, "crops") or not hasattr(views, "on_device"):
        name = getattr(views, "__name__", type(views).__name__)
        raise ConfigError(
            f"augment_on=device: the augmentation '{name}' does not come in two parts. Make it a "
            "bissl_zoo.data.views.Views, or give it `crops`, a transform of one image to tensors of fixed sizes, and "
            "`on_device(batch)`, which makes the views of these; or use augment_on=workers."
        )
    return views.crops, views.on_device


def _is_known(step: Any) -> bool:
    return in_batch.dispatch(type(step)) is not in_batch.dispatch(object)


def _check_known(steps: Sequence[Any]) -> None:
    for step in steps:
        if not _is_known(step):
            raise _unknown(step)
        if isinstance(step, (v2.Compose, v2.RandomApply)):
            _check_known(step.transforms)


def _unknown(step: Any) -> ConfigError:
    return ConfigError(
        f"augment_on=device: {type(step).__name__} cannot be done in batch. Register a function of it and of images "
        "(N, 3, H, W) with @bissl_zoo.data.views.in_batch.register, or use augment_on=workers."
    )


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image of `(N, 3, H, W)` by its factor of `(N,)`."""
    return _blend(images, 0, factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image of `(N, 3, H, W)` with its mean gray value; factor 0 gives the latter."""
    return _blend(images, pixels.rgb_to_grayscale(images).float().mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image of `(N, 3, H, W)` with its gray image; factor 0 gives the latter."""
    return _blend(images, pixels.rgb_to_grayscale(images), factor)


def _blend(images: Tensor, others: Tensor | int, ratio: Tensor) -> Tensor:
    ratio = ratio.view(-1, 1, 1, 1)
    white = 1 if images.is_floating_point() else 255
    return (images * ratio + others * (1 - ratio)).clamp_(0, white).to(images.dtype)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hues of each image of `(N, 3, H, W)` by its shift of `(N,)`, in turns from -0.5 to 0.5."""
    r, g, b = rgb = pixels.to_dtype(images, torch.float32, scale=True).unbind(dim=1)
    low, high = torch.aminmax(torch.stack(rgb), dim=0)
    chroma = high - low
    divisor = chroma.masked_fill(chroma == 0, 1)  # gray has no hue; it keeps its value with any
    sixths = torch.where(high == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    sixths = torch.where(high == r, (g - b) / divisor, sixths) + 6 * shift.view(-1, 1, 1)
    # a channel has its full value within a sixth of a turn of its hue, and falls by chroma over the next sixth
    distances = [(sixths + offset).remainder(6) for offset in (5, 3, 1)]
    turned = [high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in distances]
    return pixels.to_dtype(torch.stack(turned, dim=1), images.dtype, scale=True)


def gaussian_blur(images: Tensor, kernel_size: Sequence[int], sigma: Tensor) -> Tensor:
    """Blur each image of `(N, 3, H, W)` with its standard deviation of `(N,)`; borders are reflected.

    Args:
        kernel_size: width and height of the kernel in pixels, odd.
    """
    count, channels = images.shape[:2]
    across, down = (side // 2 for side in kernel_size)
    padded = functional.pad(images.float(), (across, across, down, down), mode="reflect")
    # one group per channel and image, hence one kernel per image
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
    """Apply `function` to each image with this probability."""
    return _those(images, torch.rand(len(images), device=images.device) < probability, function)


def _those(images: Tensor, chosen: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Apply `function` to the images that `chosen`, bool `(N,)`, selects; parameters are `(N,)` too."""
    indices = chosen.nonzero().squeeze(1)
    if not len(indices):
        return images
    return images.index_copy(0, indices, function(*(tensor[indices] for tensor in (images, *parameters))))


def _uniform(images: Tensor, bounds: Sequence[float]) -> Tensor:
    return torch.empty(len(images), device=images.device).uniform_(*bounds)


@in_batch.register
def _(transform: v2.RandomApply, images: Tensor) -> Tensor:
    return _some(images, transform.p, lambda some: in_batch(v2.Compose(list(transform.transforms)), some))


@in_batch.register
def _(transform: v2.Compose, images: Tensor) -> Tensor:
    for step in transform.transforms:
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
    return transform(images)  # not random
