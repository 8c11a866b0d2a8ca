"""Masked autoencoders, MAE (He et al., arXiv 2111.06377)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import masked_view
from bissl_zoo.errors import ConfigError
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.simmim import enlarge, patch_projection, refuse_blocks
from bissl_zoo.registry import PRETEXT_METHODS


def patchify(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the pixels of each patch, row by row and with channels last: `(N, 3, H, W)` -> `(N, L, h * w * 3)`."""
    n, channels, height, width = images.shape
    grid = images.view(n, channels, height // size[0], size[0], width // size[1], size[1])
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, size[0] * size[1] * channels)


def position_embeddings(grid: tuple[int, int], width: int) -> Tensor:
    """Return sines and cosines of column and row, `(h * w, width)` float64; the width is a multiple of 4."""
    rows, columns = torch.meshgrid(*(torch.arange(side).double() for side in grid), indexing="ij")
    bands = 10000.0 ** -(torch.arange(width // 4) / (width // 4)).double()
    angles = torch.stack([columns, rows], dim=-1).flatten(0, 1).unsqueeze(-1) * bands
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


@PRETEXT_METHODS.register("mae")
class MAE(PretextMethod):
    """Predict the normalized pixels of masked patches with a decoder; the backbone only gets the visible ones.

    The parameters of the decoder have the names of the official checkpoints. The tail is neither run nor trained.

    Args:
        backbone: a ViT of timm, shared as a whole.
        tail: see :class:`PretextMethod`.
        decoder_dim, decoder_depth, decoder_heads: width, number of blocks and attention heads of the decoder.
        augmentation: maps a PIL image to a view and its mask, see :func:`bissl_zoo.data.views.masked_view`; all masks
            of a batch hide the same number of patches.
    Raises:
        ConfigError: the backbone is no ViT that can leave out patches, or the tail contains blocks.
    """

    supports_grad_accumulation = True

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        augmentation: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        default = partial(masked_view, size=224, crop_scale=(0.2, 1.0), mask_patch=16, mask_ratio=0.75)
        super().__init__(backbone, tail, augmentation or default(interpolation="bicubic"))
        projection = patch_projection(backbone)
        if not isinstance(getattr(backbone.model, "patch_drop", None), nn.Identity):
            raise ConfigError("MAE needs a VisionTransformer of timm, without patch_drop_rate, as the backbone.")
        refuse_blocks(tail)
        self.tail.requires_grad_(False)
        self.patch: tuple[int, int] = projection.stride
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = (Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        self.decoder_embed = nn.Linear(backbone.feature_info[self.stage].channels, decoder_dim)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, decoder_dim), std=0.02))
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, projection.in_channels * self.patch[0] * self.patch[1])
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def losses(self, backbone: Backbone, views: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return `{"mse": scalar}` for images `(N, 3, S, S)` and bool masks `(N, C, C)`, True for masked cells."""
        return self.outer(self.outputs(backbone, views))

    def outputs(self, backbone: Backbone, views: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        """Return the residuals of the hidden patches, `(M, 3 * patch size)`."""
        images, mask = views
        grid = tuple(side // width for side, width in zip(images.shape[-2:], self.patch, strict=True))
        hidden = enlarge(mask, grid).flatten(1)
        target = patchify(images, self.patch)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return ((self.predict(backbone, images, hidden, grid) - target)[hidden],)

    def outer(self, outputs: tuple[Tensor]) -> dict[str, Tensor]:
        """Return `{"mse": scalar}`, quadratic in the residuals."""
        return {"mse": outputs[0].square().mean()}

    def predict(self, backbone: Backbone, images: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return predicted pixels `(N, L, 3 * patch size)` of all patches from those that are not `hidden (N, L)`."""
        model = backbone.model
        prefix, count = model.num_prefix_tokens, hidden.shape[1]
        visible = (~hidden).nonzero()[:, 1].view(len(images), -1, 1)

        def drop(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            patches = tokens[:, prefix:].gather(1, visible.expand(-1, -1, tokens.shape[-1]))
            return torch.cat([tokens[:, :prefix], patches], dim=1)

        handle = model.patch_drop.register_forward_hook(drop)
        try:
            tokens = self.decoder_embed(model.forward_features(images))
        finally:
            handle.remove()
        width = tokens.shape[-1]
        patches = self.mask_token.to(tokens.dtype).expand(len(images), count, -1)
        patches = patches.scatter(1, visible.expand(-1, -1, width), tokens[:, prefix:])
        patches = patches + position_embeddings(grid, width).to(tokens)
        tokens = self.decoder_blocks(torch.cat([tokens[:, :prefix], patches], dim=1))
        return self.decoder_pred(self.decoder_norm(tokens)[:, prefix:])
