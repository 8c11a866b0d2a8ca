"""SimMIM with the numbers of its paper (arXiv 2111.09886); needs a ViT, see common/backbones/vit_small.py."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import masked_view
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(name="simmim", augmentation=L(masked_view)(size=192, mask_patch=32, mask_ratio=0.6))
