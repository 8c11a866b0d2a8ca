"""SimSiam (arXiv 2011.10566); its views at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="simsiam",
    projector=[2048, 2048, 2048],
    predictor=[512, 2048],
    augmentation=L(two_views)(
        size=96,
        crop_scale=[0.2, 1.0],
        aspect_ratio=[3 / 4, 4 / 3],
        jitter=[0.4, 0.4, 0.4, 0.1],
        blur_probability=[0.5, 0.5],
        solarize_probability=[0.0, 0.0],
    ),
)
