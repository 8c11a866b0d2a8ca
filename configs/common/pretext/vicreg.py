"""VICReg (arXiv 2105.04906); its views at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="vicreg",
    projector=[8192, 8192, 8192],
    invariance=25.0,
    variance=25.0,
    covariance=1.0,
    augmentation=L(two_views)(
        size=96, aspect_ratio=[3 / 4, 4 / 3], blur_probability=[0.5, 0.5], solarize_probability=[0.1, 0.1]
    ),
)
