"""Barlow Twins (arXiv 2103.03230); its views at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="barlow_twins",
    projector=[8192, 8192, 8192],
    redundancy=0.005,
    augmentation=L(two_views)(size=96, aspect_ratio=[3 / 4, 4 / 3]),
)
