"""BYOL with the numbers of the BiSSL paper."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="byol",
    projector=[256, 256, 256],
    predictor=[256, 256, 256],
    decay=0.9995,
    augmentation=L(two_views)(size=96),
)
