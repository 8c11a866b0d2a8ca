"""ViT-S/16 of timm, with average pooling for a class token so that it splits, and for images of any size."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

vit_small = L(build_backbone)(
    name="vit_small_patch16_224",
    class_token=False,
    global_pool="avg",
    img_size=96,  # of the positions that are learned; those of other sizes, such as local crops, are interpolated
    dynamic_img_size=True,
)
