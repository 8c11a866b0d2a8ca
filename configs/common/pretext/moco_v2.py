"""MoCo v2 (arXiv 1911.05722, 2003.04297); its views at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="moco_v2",
    projector=[2048, 128],
    queue_length=65536,  # keys; at most the number of unlabelled images, or images are compared with their own old keys
    temperature=0.2,
    decay=0.999,
    augmentation=L(two_views)(
        size=96,
        crop_scale=[0.2, 1.0],
        aspect_ratio=[3 / 4, 4 / 3],
        jitter=[0.4, 0.4, 0.4, 0.1],
        blur_probability=[0.5, 0.5],
        solarize_probability=[0.0, 0.0],
    ),
)
