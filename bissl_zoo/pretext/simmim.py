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

#: residuals below this, in units of the normalised input, count as this in the weights of the curvature
SMALLEST_RESIDUAL = 0.01


def masked_l1(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Return the mean absolute error of the masked pixels (arXiv 2111.09886, section 3.4).

    Args:
        prediction, images: `(N, 3, H, W)`.
        mask: bool `(N, h, w)`; each cell is a rectangle of pixels, True for masked ones.
    """
    hidden = enlarge(mask, images.shape[-2:]).unsqueeze(1).expand_as(images)
    return ((prediction - images).abs() * hidden).sum() / hidden.sum()


@PRETEXT_METHODS.register("simmim")
class SimMIM(PretextMethod):
    """Predict the pixels of masked patches from the visible ones.

    A learned token replaces the embeddings of masked patches before positions are added. One linear layer maps each
    cell of the trunk's last map to its pixels, which are normalized like the backbone's input. The tail, which pools
    that map, is neither run nor trained.

    Args:
        backbone: a ViT without class and register tokens, split at its last stage.
        tail: see :class:`PretextMethod`.
        augmentation: maps a PIL image to a view and its mask, see :func:`bissl_zoo.data.views.masked_view`.
    Raises:
        ConfigError: the backbone has no patch embedding, or the tail contains blocks.
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
        refuse_blocks(tail)
        self.tail.requires_grad_(False)
        info = backbone.feature_info[self.stage]
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(projection.out_channels), std=0.02))
        self.decoder = nn.Sequential(
            nn.Conv2d(info.channels, 3 * info.stride**2, kernel_size=1), nn.PixelShuffle(info.stride)
        )

    def losses(self, backbone: Backbone, views: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return `{"l1": scalar}` for images `(N, 3, S, S)` and bool masks `(N, C, C)`, True for masked cells."""
        images, mask = views
        prediction = self.decoder(self.hidden_features(backbone, images, mask))
        return {"l1": masked_l1(prediction, images, mask)}

    def outputs(self, backbone: Backbone, views: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the residuals of the hidden pixels `(M,)` and their weights, see :meth:`outer`."""
        images, mask = views
        prediction = self.decoder(self.hidden_features(backbone, images, mask))
        hidden = enlarge(mask, images.shape[-2:]).unsqueeze(1).expand_as(images)
        residual = (prediction - images)[hidden]
        return residual, 1.0 / residual.detach().abs().clamp(min=SMALLEST_RESIDUAL)

    def outer(self, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return `{"l1": scalar}`, quadratic in the residuals.

        The second derivative of an absolute value is zero, so it is replaced by the parabola that touches it at the
        residual and lies above it, as in iteratively reweighted least squares: `|r| <= (w r^2 + 1/w) / 2`, `w = 1/|r|`.
        """
        residual, weight = outputs
        return {"l1": (weight * residual.square() + 1.0 / weight).mean() / 2}

    def hidden_features(self, backbone: Backbone, images: Tensor, mask: Tensor) -> Tensor:
        """Return the trunk's map `(N, C, h, w)` of images whose patches under `mask` are replaced by the token.

        Raises:
            ConfigError: a cell of the mask does not consist of whole patches.
        """
        patch = patch_projection(backbone).stride
        grid = tuple(side // width for side, width in zip(images.shape[-2:], patch, strict=True))
        if any(patches % cells for patches, cells in zip(grid, mask.shape[-2:], strict=True)):
            raise ConfigError(
                f"SimMIM: the mask has {tuple(mask.shape[-2:])} cells, which do not consist of whole patches: the "
                f"backbone cuts these images into {grid}. Set augmentation.mask_patch to a multiple of {patch[0]}."
            )
        hidden = enlarge(mask, grid)

        def hide(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            # timm's tokens are (N, patches, C) or (N, h, w, C)
            return torch.where(hidden.reshape(*tokens.shape[:-1], 1), self.mask_token.to(tokens.dtype), tokens)

        handle = backbone.model.patch_embed.register_forward_hook(hide)
        try:
            return backbone(images)[self.stage]
        finally:
            handle.remove()


def patch_projection(backbone: Backbone) -> nn.Conv2d:
    """Return the convolution that embeds the patches of a backbone; its stride is the patch size.

    Raises:
        ConfigError: there is none, or its patches overlap, so that masked pixels would leak.
    """
    embedding = getattr(getattr(backbone, "model", None), "patch_embed", None)
    projection = getattr(embedding, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        name = getattr(backbone, "name", type(backbone).__name__)
        raise ConfigError(
            f"The pretext method masks patches, but the backbone '{name}' has no embedding of non-overlapping patches. "
            "Use a ViT (configs/common/backbones/vit_small.py), or another pretext method."
        )
    return projection


def refuse_blocks(tail: Tail) -> None:
    """Raise `ConfigError` if the tail contains blocks, which a method that does not run it would not train."""
    blocks = getattr(getattr(tail, "model", None), "blocks", None)
    if blocks is not None and any(True for _ in blocks.parameters()):
        raise ConfigError(
            "The pretext method predicts pixels from the last map of the shared trunk, but the split leaves blocks "
            "after it. Share the whole backbone: bilevel.shared_stage=null."
        )


def enlarge(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the cells of masks `(N, h, w)` to `(N, *size)`."""
    for dim, side in zip((1, 2), size, strict=True):
        mask = mask.repeat_interleave(side // mask.shape[dim], dim=dim)
    return mask
