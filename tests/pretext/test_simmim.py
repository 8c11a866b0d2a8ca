import pytest
import torch
from pretext_methods import MASK, VIT, build_method
from torch import nn
from torch.nn import functional

from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import build_backbone, build_pretext


def build(**backbone):
    return build_method("simmim", VIT | backbone)


def images(size=32, count=2, dtype=torch.float32):
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dynamic", [True, False])  # timm's tokens are (N, h, w, C) or (N, patches, C)
def test_loss_is_the_papers_formula(dynamic):
    trunk, method = build(dynamic_img_size=dynamic)
    pixels = images()
    tokens = trunk.model.patch_embed.proj(pixels).permute(0, 2, 3, 1)
    tokens = torch.where(MASK.unsqueeze(-1), method.mask_token, tokens).flatten(1, 2) + trunk.model.pos_embed
    encoded = trunk.model.blocks(tokens)
    rows = functional.linear(encoded, method.decoder[0].weight.flatten(1), method.decoder[0].bias)
    total, count = 0.0, 0
    for image, row, column in MASK.nonzero().tolist():
        patch = pixels[image, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        total += (rows[image, 2 * row + column].view(3, 16, 16) - patch).abs().sum()
        count += patch.numel()
    torch.testing.assert_close(method.losses(trunk, (pixels, MASK))["l1"], total / count)


def test_cells_of_the_mask_may_be_of_several_patches():
    trunk, method = build(patch_size=8)
    fine = MASK.repeat_interleave(2, 1).repeat_interleave(2, 2)
    losses = [method.losses(trunk, (images(), mask))["l1"] for mask in (MASK, fine)]
    torch.testing.assert_close(*losses)
    coarse_on_fine = torch.ones(2, 3, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"\(3, 3\) cells.*whole patches.*\(4, 4\).*multiple of 8"):
        method.losses(trunk, (images(), coarse_on_fine))


def test_nothing_is_left_on_the_backbone_even_after_an_error():
    trunk, method = build()
    plain = trunk(images())["blocks.5"]
    method.losses(trunk, (images(), MASK))
    with pytest.raises(RuntimeError, match="channels"):
        method.losses(trunk, (images()[:, :1], MASK))
    assert not trunk.model.patch_embed._forward_hooks
    assert torch.equal(trunk(images())["blocks.5"], plain)


def test_the_tail_is_neither_run_nor_trained():
    trunk, method = build()
    method.tail.register_forward_pre_hook(lambda module, inputs: pytest.fail("the tail was run"))
    method.losses(trunk, (images(), MASK))["l1"].backward()
    assert not any(p.requires_grad for p in method.tail.parameters())
    trained = [name for name, p in method.named_parameters() if p.grad is not None]
    assert trained == ["mask_token", "decoder.0.weight", "decoder.0.bias"]


def test_a_backbone_without_patches_or_with_overlapping_ones_is_refused():
    trunk, tail = build_backbone(name="test_resnet").split("c3")
    with pytest.raises(ConfigError, match="'test_resnet' has no embedding of non-overlapping patches. Use a ViT"):
        build_pretext(name="simmim", backbone=trunk, tail=tail)
    trunk, tail = build_backbone(**VIT).split("blocks.5")
    trunk.model.patch_embed.proj = nn.Conv2d(3, 64, 24, stride=16, padding=4)
    with pytest.raises(ConfigError, match="no embedding of non-overlapping patches"):
        build_pretext(name="simmim", backbone=trunk, tail=tail)


def test_a_split_that_leaves_blocks_in_the_tail_is_refused():
    trunk, tail = build_backbone(**VIT).split("blocks.3")
    with pytest.raises(ConfigError, match="leaves blocks after it.*bilevel.shared_stage=null"):
        build_pretext(name="simmim", backbone=trunk, tail=tail)
