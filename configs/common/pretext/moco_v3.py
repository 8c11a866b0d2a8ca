"""MoCo v3 (arXiv 2104.02057); its views at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="moco_v3",
    projector=[4096, 4096, 256],
    predictor=[4096, 256],
    temperature=0.2,
    decay=0.99,
    augmentation=L(two_views)(size=96, aspect_ratio=[3 / 4, 4 / 3]),
)
