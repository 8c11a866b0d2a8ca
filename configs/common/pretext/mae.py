"""MAE with the numbers of its paper (arXiv 2111.06377); needs a ViT, such as vit_base_patch16_224."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import masked_view
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="mae",
    decoder_dim=512,
    decoder_depth=8,
    decoder_heads=16,
    augmentation=L(masked_view)(
        size=224, crop_scale=[0.2, 1.0], mask_patch=16, mask_ratio=0.75, interpolation="bicubic"
    ),
)
