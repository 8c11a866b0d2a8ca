"""timm's ResNets."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

resnet50 = L(build_backbone)(name="resnet50")
resnet18 = L(build_backbone)(name="resnet18")
