"""SimMIM (Xie et al., arXiv 2111.09886)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import masked_view
from bissl_zoo.errors import ConfigError
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def masked_l1(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of the hidden pixels (arXiv 2111.09886, section 3.4).

    Args:
        prediction, images: `(N, 3, H, W)`.
        mask: `(N, h, w)` of bool, each of its cells a rectangle of pixels; true where they are hidden.
    """
    hidden = _enlarge(mask, images.shape[-2:]).unsqueeze(1).expand_as(images)
    return ((prediction - images).abs() * hidden).sum() / hidden.sum()


@PRETEXT_METHODS.register("simmim")
class SimMIM(PretextMethod):
    """Predict the pixels of hidden patches from those that are seen.

    A learned token takes the place of the hidden patches' embeddings, before positions are added to them; one linear
    layer maps each cell of the trunk's last map to its pixels, normalised as the backbone's input is. The tail, which
    pools that map, takes no part: it is neither run nor trained.

    Args:
        backbone: a ViT without class and register tokens, split at its last stage.
        augmentation: PIL image -> a view and its mask, see :func:`bissl_zoo.data.views.masked_view`.
    Raises:
        ConfigError: the backbone embeds no patches, or blocks of it are left in the tail.
    """

    supports_grad_accumulation = True

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        augmentation: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation or masked_view())
        projection = patch_projection(backbone)
        _refuse_blocks(tail)
        self.tail.requires_grad_(False)
        info = backbone.feature_info[self.stage]
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(projection.out_channels), std=0.02))
        self.decoder = nn.Sequential(
            nn.Conv2d(info.channels, 3 * info.stride**2, kernel_size=1), nn.PixelShuffle(info.stride)
        )

    def losses(self, backbone: Backbone, views: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`{"l1": scalar}` of images `(N, 3, S, S)` and masks `(N, C, C)` of bool, true where hidden."""
        images, mask = views
        prediction = self.decoder(self.hidden_features(backbone, images, mask))
        return {"l1": masked_l1(prediction, images, mask)}

    def hidden_features(self, backbone: Backbone, images: Tensor, mask: Tensor) -> Tensor:
        """The trunk's map `(N, C, h, w)` of images in which the patches under `mask` are hidden.

        Raises:
            ConfigError: the cells of the mask are not made of whole patches.
        """
        patch = patch_projection(backbone).stride
        grid = tuple(side // width for side, width in zip(images.shape[-2:], patch, strict=True))
        if any(patches % cells for patches, cells in zip(grid, mask.shape[-2:], strict=True)):
            raise ConfigError(
                f"SimMIM: the mask of {tuple(mask.shape[-2:])} cells does not fall on whole patches of the backbone, "
                f"which cuts these images into {grid}. Make augmentation.mask_patch a multiple of {patch[0]} pixels."
            )
        hidden = _enlarge(mask, grid)

        def hide(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            # timm's tokens come as (N, patches, C) or (N, h, w, C)
            return torch.where(hidden.reshape(*tokens.shape[:-1], 1), self.mask_token.to(tokens.dtype), tokens)

        handle = backbone.model.patch_embed.register_forward_hook(hide)
        try:
            return backbone(images)[self.stage]
        finally:
            handle.remove()


def patch_projection(backbone: Backbone) -> nn.Conv2d:
    """The convolution by which a backbone embeds patches, its stride their size.

    Raises:
        ConfigError: the backbone has none, or one whose patches overlap, so that a mask would leak.
    """
    embedding = getattr(getattr(backbone, "model", None), "patch_embed", None)
    projection = getattr(embedding, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        name = getattr(backbone, "name", type(backbone).__name__)
        raise ConfigError(
            f"SimMIM hides patches, and the backbone '{name}' does not embed patches that lie side by side. Take a "
            "ViT, built with class_token=False and global_pool='avg' (configs/common/backbones/vit_small.py), or "
            "another pretext method."
        )
    return projection


def _refuse_blocks(tail: Tail) -> None:
    blocks = getattr(getattr(tail, "model", None), "blocks", None)
    if blocks is not None and any(True for _ in blocks.parameters()):
        raise ConfigError(
            "SimMIM predicts pixels from the shared trunk's last map, and the split leaves blocks of the backbone "
            "after it. Share the last stage: bilevel.shared_stage=null."
        )


def _enlarge(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the cells of masks `(N, h, w)` until they are `(N, *size)`."""
    for dim, side in zip((1, 2), size, strict=True):
        mask = mask.repeat_interleave(side // mask.shape[dim], dim=dim)
    return mask
