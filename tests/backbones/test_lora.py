import copy

import pytest
import timm
import torch

from bissl_zoo.backbones.lora import LoRALinear, add_lora, merge_lora, share_frozen, without_factors
from bissl_zoo.errors import RegistryError
from bissl_zoo.registry import build_backbone

#: small transformers with fused, separate and unused projections: `beit` reads the weight of its `qkv`
TRANSFORMERS = {
    "test_vit": {},
    "beit_base_patch16_224": dict(embed_dim=16, depth=1, num_heads=2, img_size=32),
    "eva02_tiny_patch14_224": dict(embed_dim=16, depth=1, num_heads=2, img_size=28),
    "swin_tiny_patch4_window7_224": dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), img_size=56),
    "pvt_v2_b0": {},
}


def build(name="test_vit", r=3, alpha=6, targets=("q", "v"), **arguments):
    torch.manual_seed(0)
    backbone = build_backbone(name=name, **arguments)
    add_lora(backbone, r, alpha, targets)
    return backbone


def shake(backbone):
    """Move all trained parameters, as training does."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return backbone


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_merged_weights_compute_the_same_in_timms_own_network(name):
    arguments = TRANSFORMERS[name]
    backbone = build(name, **arguments)
    plain = timm.create_model(name, num_classes=0, **arguments).eval()
    size = arguments.get("img_size", 64)
    images = torch.randn(2, 3, *([160, 160] if name == "test_vit" else [size, size]))
    plain.load_state_dict(merge_lora(backbone.state_dict()))
    assert torch.equal(plain(images), backbone.model.eval()(images))  # B is zero
    shake(backbone)
    moved = backbone.model(images)
    assert (moved - plain(images)).abs().max() > 1e-3
    plain.load_state_dict(merge_lora(backbone.state_dict()))
    torch.testing.assert_close(plain(images), moved, rtol=1e-4, atol=1e-5)


def test_only_the_factors_are_trained_and_only_in_queries_and_values():
    backbone = shake(build())
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {f"model.blocks.{n}.attn.qkv.lora_{f}_{t}" for n in range(6) for f in "ab" for t in "qv"}
    layer = backbone.model.blocks[0].attn.qkv
    addition = (layer.weight - layer._parameters["weight"]).detach()
    assert not addition[64:128].any() and addition[:64].any() and addition[128:].any()
    expected = 2.0 * layer.lora_b_v @ layer.lora_a_v  # alpha / r
    torch.testing.assert_close(addition[128:], expected.detach(), rtol=1e-4, atol=1e-6)
    images = torch.randn(2, 3, 160, 160)
    backbone(images)["blocks.5"].sum().backward()
    # queries of the last block of one layer may vanish, but no factor is unused
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_a_vit_b_trains_at_most_three_million_parameters():
    with torch.device("meta"):
        backbone = build("vit_base_patch16_224", r=64, alpha=64)
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 12 * 2 * 2 * 64 * 768 <= 3e6


def test_a_state_without_factors_starts_at_its_own_output():
    backbone, plain = shake(build()), build_backbone(name="test_vit")
    backbone.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(backbone.model.eval()(images), plain.model.eval()(images))
    assert all(layer.lora_a_q.any() for layer in backbone.modules() if isinstance(layer, LoRALinear))
    assert without_factors(backbone.state_dict()).keys() == plain.state_dict().keys()


def test_both_levels_use_one_copy_of_the_frozen_weights():
    lower, upper = build(), build()
    shake(lower)
    before = copy.deepcopy(upper.state_dict())
    share_frozen(lower, upper)
    pairs = zip(lower.parameters(), upper.parameters(), strict=True)
    assert all((a is b) == (not a.requires_grad) for a, b in pairs)
    assert all(torch.equal(value, before[key]) for key, value in upper.state_dict().items())


def test_other_layers_are_targets_and_wrong_ones_are_refused():
    assert isinstance(build(targets=["fc1"]).model.blocks[0].mlp.fc1, LoRALinear)
    with pytest.raises(RegistryError, match="no linear layer for 'fc3'.*'fc2'.*Known: fc1, fc2, k, proj, q, v"):
        build(targets=["q", "fc3"])
    with pytest.raises(RegistryError, match="r=0"):
        build(r=0)
