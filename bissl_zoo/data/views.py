"""The augmented views that pretext methods compare."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bissl_zoo.data.device_views import halves, in_batch
from bissl_zoo.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Views:
    """Apply several transforms to one image: PIL image -> tuple of `(3, S, S)` float32 views, normalised.

    S may differ from view to view; a batch is a sequence of tensors, one per view. Views of a batch may be made in two
    parts: `crops` in the loader's workers, the rest by `on_device`.
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, ...]:
        """The views of one image, PIL's or `(3, H, W)` uint8, each with its own draw of the randomness."""
        pixels = _pixels(image)
        return tuple(transform(pixels) for transform in self.transforms)

    @property
    def crops(self) -> "Views":
        """The first part of each view: PIL image -> crops `(3, S, S)` of uint8, with the geometry of the views.

        Raises:
            ConfigError: a transform does not come in two parts, see :func:`bissl_zoo.data.device_views.halves`.
        """
        return Views([halves(transform)[0] for transform in self.transforms])

    def on_device(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The views `(N, 3, S, S)` of a batch of `crops`, drawn on its device, each image by itself."""
        transforms = zip(self.transforms, batch, strict=True)
        return tuple(in_batch(halves(transform)[1], crops) for transform, crops in transforms)


class MaskedView:
    """One transform and a random mask: PIL image -> view `(3, S, S)`, mask `(C, C)` of bool, true where it hides.

    The mask is drawn with the sample, so that whatever is computed of a batch sees one mask.

    Args:
        cells: C, how many cells the mask has along a side.
        hidden: how many of its C * C cells are true.
    """

    def __init__(self, transform: Callable[[Any], Tensor], cells: int, hidden: int) -> None:
        self.transform, self.cells, self.hidden = transform, cells, hidden

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, Tensor]:
        """A view of one image, PIL's or `(3, H, W)` uint8, and a mask, each with its own draw of the randomness."""
        view = self.transform(_pixels(image))
        mask = torch.zeros(self.cells**2, dtype=torch.bool)
        mask[torch.randperm(len(mask))[: self.hidden]] = True
        return view, mask.view(self.cells, self.cells)

    @property
    def crops(self) -> "MaskedView":
        """The first part: PIL image -> crop `(3, S, S)` of uint8 and the mask; see :attr:`Views.crops`."""
        return MaskedView(halves(self.transform)[0], self.cells, self.hidden)

    def on_device(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Views `(N, 3, S, S)` and masks of a batch of `crops`, drawn on its device."""
        crops, mask = batch
        return in_batch(halves(self.transform)[1], crops), mask


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
        jitter: shifts for brightness, contrast, saturation and hue.
        blur_probability: for the first and the second view; likewise `solarize_probability`.
        blur_sigma: range of the Gaussian's standard deviation in pixels.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    """
    view = partial(
        _view,
        aspect_ratio=aspect_ratio,
        jitter=jitter,
        jitter_probability=jitter_probability,
        grayscale_probability=grayscale_probability,
        flip_probability=flip_probability,
        blur_sigma=blur_sigma,
        mean=mean,
        std=std,
    )
    return Views([view(size, crop_scale, b, s) for b, s in zip(blur_probability, solarize_probability, strict=True)])


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

    The sides are not the paper's 224 and 96: 96 is BiSSL's, and 48 the next multiple of 16, for ViTs whose patches are
    16 wide, to the same fraction of it (41).

    Args:
        size, local_size: side of the global and of the local crops in pixels.
        crop_scale, local_scale: area of the global and of the local crops, as a fraction of the image.
        blur_probability: for the first, the second global crop and each local one; likewise `solarize_probability`.
        aspect_ratio, jitter, blur_sigma, mean, std: as for :func:`two_views`.
    """
    view = partial(
        _view,
        aspect_ratio=aspect_ratio,
        jitter=jitter,
        jitter_probability=jitter_probability,
        grayscale_probability=grayscale_probability,
        flip_probability=flip_probability,
        blur_sigma=blur_sigma,
        mean=mean,
        std=std,
    )
    first, second, local = zip(blur_probability, solarize_probability, strict=True)
    crops = [view(size, crop_scale, *first), view(size, crop_scale, *second)]
    return Views(crops + [view(local_size, local_scale, *local) for _ in range(local_crops)])


def masked_view(
    size: int = 192,
    crop_scale: tuple[float, float] = (0.67, 1.0),
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    mask_patch: int = 32,
    mask_ratio: float = 0.6,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> MaskedView:
    """A lightly augmented crop and a mask over its patches (SimMIM, arXiv 2111.09886, section 4.1, and its code).

    Args:
        mask_patch: side in pixels of the squares that are hidden or seen as a whole; a multiple of the backbone's own
            patch.
        mask_ratio: fraction of the squares that are hidden, rounded up to a whole number of them.
        size, crop_scale, aspect_ratio, mean, std: as for :func:`two_views`.
    Raises:
        ConfigError: the squares do not tile the view, or all or none of them would be hidden.
    """
    if size % mask_patch:
        raise ConfigError(f"masked_view: size={size} is no multiple of mask_patch={mask_patch}. Change one of them.")
    cells = size // mask_patch
    hidden = math.ceil(round(mask_ratio * cells**2, 6))  # what is whole but for its rounding is not rounded up
    if not 0 < hidden < cells**2:
        raise ConfigError(
            f"masked_view: mask_ratio={mask_ratio} hides {hidden} of {cells**2} squares of {mask_patch} pixels; some "
            "must be hidden and some seen. Change mask_ratio, or take a smaller mask_patch."
        )
    crop = v2.RandomResizedCrop(size, tuple(crop_scale), tuple(aspect_ratio), antialias=True)
    return MaskedView(
        v2.Compose([crop, v2.RandomHorizontalFlip(flip_probability), *_normalized(mean, std)]), cells, hidden
    )


def _view(
    size: int,
    crop_scale: Sequence[float],
    blur: float,
    solarize: float,
    *,
    aspect_ratio: Sequence[float],
    jitter: Sequence[float],
    jitter_probability: float,
    grayscale_probability: float,
    flip_probability: float,
    blur_sigma: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> v2.Compose:
    """One strongly augmented crop, blurred and solarized with these probabilities."""
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


def _pixels(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image)


def _normalized(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
