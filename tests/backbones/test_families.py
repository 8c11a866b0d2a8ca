"""Families of timm: a small network of each through trunk, pretext loss, Gauss-Newton product and task head.

The table in docs/reference/backbones.md is what `python tests/backbones/test_families.py` prints.
"""

import itertools
from pathlib import Path

import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler

from bissl_zoo.backbones import SplitError, share, tail_input
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.hypergradient.cg import ConjugateGradient
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.registry import build_backbone, build_pretext, build_task

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "backbones.md"
TINY = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
#: a network of each module of timm, its arguments, and the side of the images if that is not 64
FAMILIES = {
    "beit": ("beit_base_patch16_224", TINY),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {**TINY, "depth_token_only": 1}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}),
    "deit": ("deit_tiny_distilled_patch16_224", TINY),
    "densenet": ("densenet121", {"block_config": (1, 1, 1, 1)}),
    "dla": ("dla46x_c", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}, 224),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}, 224),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", TINY),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_a", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 2, 1)}, 224),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}, 224),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {}, 160),
    "metaformer": ("poolformerv2_s12", {}),
    "mlp_mixer": ("gmlp_ti16_224", {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}, 224),
    "pvt_v2": ("pvt_v2_b0", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "senet": ("legacy_seresnet18", {}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", SWIN),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", SWIN),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "twins": ("twins_svt_small", {"embed_dims": (16, 32, 48, 64), "depths": (2, 2, 2, 2)}, 224),
    "vision_transformer": ("test_vit", {"img_size": 64}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", {"img_size": 64}),
    "vision_transformer_sam": ("samvit_base_patch16", {**TINY, "global_attn_indexes": (1,)}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xcit": ("xcit_nano_12_p8_224", {"depth": 2}, 64),
}


def measure(name, args, size=64):
    """Return what a network can do: shares all or also a part of itself; loss, product and head are finite."""
    torch.manual_seed(0)
    whole = build_backbone(name=name, **args)
    middle = whole.stages[len(whole.stages) // 2 - 1]
    try:
        whole.split(middle)
        parts = "yes"
    except SplitError:
        parts = "no"
    trunk, tail = share(whole)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        whole.eval(), trunk.eval(), tail.eval()
        assert torch.equal(tail(tail_input(trunk(images), trunk.out_features[-1])), whole.model(images))
    pretext = build_pretext(name="simclr", backbone=trunk, tail=tail, projector=[8, 8])
    task = build_task(name="classification", backbone=trunk, classes=["a", "b"])
    lower, upper = (level(name, *parts) for name, parts in (("lower", (trunk, pretext)), ("upper", (trunk, task))))
    problem = BiLevel(lower, upper, ConjugateGradient(damping=0.1), curvature="gauss_newton")
    problem.time_constant = 1.0
    operator = problem.curvature((images, images.flip(3))).prepare()
    product = operator.hessian_product(torch.ones(sum(operator.block_sizes)))
    operator.release()
    loss, _ = upper.loss(trunk, (images, torch.tensor([0, 1])))
    loss.backward()
    assert torch.isfinite(product).all() and product.any() and torch.isfinite(loss)
    return parts


def level(name, backbone, head):
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    return Level(name, backbone, head, optimizer, itertools.repeat(None), LRMultiplier(ConstantParamScheduler(1.0)), 1)


def table():
    """Return the table of the documentation."""
    rows = ["| module of timm | checked with | whole | a part |", "|---|---|---|---|"]
    for family, (name, args, *size) in FAMILIES.items():
        try:
            works, parts = "yes", measure(name, args, *size)
        except Exception as error:  # any error of any network means that it does not work
            works, parts = f"no: {type(error).__name__}", "no"
        rows.append(f"| {family} | `{name}` | {works} | {parts} |")
    return rows


@pytest.mark.slow
def test_the_table_of_families_is_what_they_do():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert table() == rows


if __name__ == "__main__":
    print("\n".join(table()))
