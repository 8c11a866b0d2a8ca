"""SimCLR with the numbers of the BiSSL paper."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import two_views
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="simclr", projector=[256, 256, 256], temperature=0.5, augmentation=L(two_views)(size=96)
)
