"""The augmented views that pretext methods compare."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Views:
    """Apply several transforms to one image: PIL image -> tuple of `(3, S, S)` float32 views, normalised."""

    def __init__(self, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        """The views of one image, each with its own draw of the randomness."""
        pixels = v2.functional.pil_to_tensor(image)
        return tuple(transform(pixels) for transform in self.transforms)


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
    kernel = max(
        3, size // 10 // 2 * 2 + 1
    )  # odd, about a tenth of the side as in SimCLR (arXiv 2002.05709, appendix A)

    def view(blur: float, solarize: float) -> v2.Compose:
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
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )

    return Views([view(b, s) for b, s in zip(blur_probability, solarize_probability, strict=True)])
