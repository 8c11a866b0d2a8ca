"""timm's ViT-S/16 for images of any size, with average pooling instead of a class token so that it can be split."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

vit_small = L(build_backbone)(
    name="vit_small_patch16_224",
    class_token=False,
    global_pool="avg",
    img_size=96,  # size of the learned position embeddings; other sizes, such as local crops, interpolate them
    dynamic_img_size=True,
)
