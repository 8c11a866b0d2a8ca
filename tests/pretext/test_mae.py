import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bissl_zoo.config import instantiate, load_config
from bissl_zoo.errors import ConfigError
from bissl_zoo.pretext.mae import position_embeddings
from bissl_zoo.registry import build_backbone, build_pretext

SIZES = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
#: one of four patches is visible: the second of the first image, the first of the second
HIDDEN = torch.tensor([[[True, False], [True, True]], [[False, True], [True, True]]])


def build(**vit):
    backbone = build_backbone(name="test_vit", img_size=32, **vit)
    trunk = backbone.whole_trunk() if hasattr(backbone, "whole_trunk") else backbone
    torch.manual_seed(0)
    return trunk, build_pretext(name="mae", backbone=trunk, tail=nn.Identity(), **SIZES)


def images(seed=1):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def official_positions(size, width):
    """`get_2d_sincos_pos_embed` of the authors' code, in numpy."""

    def one(dim, positions):
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=float) / (dim / 2.0))
        out = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(size, dtype=float), np.arange(size, dtype=float)))  # here w goes first
    return np.concatenate([one(width // 2, grid[0]), one(width // 2, grid[1])], axis=1)


def test_positions_are_those_of_the_official_decoder():
    np.testing.assert_allclose(position_embeddings((5, 5), 16), official_positions(5, 16), atol=1e-12)


@pytest.mark.parametrize("class_token", [True, False])
def test_the_loss_is_the_formula_of_the_paper(class_token):
    trunk, method = build(**({} if class_token else {"class_token": False, "global_pool": "avg"}))
    model, pixels = trunk.model, images()
    total = 0.0
    for image, row, column in (~HIDDEN).nonzero().tolist():  # one image at a time, its patches written out
        seen = 2 * row + column
        tokens = model._pos_embed(model.patch_embed(pixels[image : image + 1]))
        tokens = [tokens[:, :1], tokens[:, seen + 1 : seen + 2]] if class_token else [tokens[:, seen : seen + 1]]
        encoded = method.decoder_embed(model.norm(model.blocks(torch.cat(tokens, dim=1))))
        patches = [encoded[:, -1:] if n == seen else method.mask_token for n in range(4)]
        patches = torch.cat(patches, dim=1) + torch.tensor(official_positions(2, 16), dtype=torch.float32)
        decoded = torch.cat([encoded[:, :1], patches], dim=1) if class_token else patches
        for block in method.decoder_blocks:
            decoded = block(decoded)
        rows = method.decoder_pred(method.decoder_norm(decoded))[0, -4:]
        for n in {0, 1, 2, 3} - {seen}:
            y, x = 16 * (n // 2), 16 * (n % 2)
            target = pixels[image, :, y : y + 16, x : x + 16].permute(1, 2, 0).flatten()  # row by row, channels last
            target = (target - target.mean()) / (target.var() + 1e-6) ** 0.5
            total += (rows[n] - target).square().mean()
    torch.testing.assert_close(method.losses(trunk, (pixels, HIDDEN))["mse"], total / 6)


def test_hidden_pixels_are_not_seen_and_nothing_is_left_on_the_backbone():
    trunk, method = build()
    hidden = HIDDEN.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    others = torch.where(hidden, images(2), images())
    predictions = [method.predict(trunk, x, HIDDEN.flatten(1), (2, 2)) for x in (images(), others)]
    assert torch.equal(*predictions)
    assert not torch.equal(method.predict(trunk, images(2), HIDDEN.flatten(1), (2, 2)), predictions[0])
    with pytest.raises(RuntimeError, match="channels"):
        method.losses(trunk, (images()[:, :1].expand(2, 1, 32, 32), HIDDEN))
    assert not trunk.model.patch_drop._forward_hooks


def test_the_names_are_those_of_the_official_checkpoints():
    _, method = build()
    names = {name.split(".")[0] for name, _ in method.named_parameters()}
    assert names == {"decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert method.mask_token.shape == (1, 1, 16)
    block = {name.removeprefix("decoder_blocks.0.") for name, _ in method.decoder_blocks[0].named_parameters()}
    kinds = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert block == {f"{kind}.{part}" for kind in kinds for part in ("weight", "bias")}


def test_a_backbone_that_cannot_leave_out_patches_is_refused():
    backbone = build_backbone(name="swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    with pytest.raises(ConfigError, match="MAE needs a VisionTransformer"):
        build_pretext(name="mae", backbone=backbone, tail=nn.Identity())
    with pytest.raises(ConfigError, match="non-overlapping patches"):
        build_pretext(name="mae", backbone=build_backbone(name="test_resnet"), tail=nn.Identity())


def test_the_view_of_the_config_hides_147_of_196_patches():

    view, mask = instantiate(load_config("common/pretext/mae.py").pretext.augmentation)(Image.new("RGB", (300, 200)))
    assert view.shape == (3, 224, 224) and mask.shape == (14, 14) and mask.sum() == 147
