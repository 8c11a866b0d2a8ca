"""Pretext methods, the lower level: one method per file, registered in `PRETEXT_METHODS`."""

from bissl_zoo.pretext.byol import BYOL
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.simclr import SimCLR

__all__ = ["BYOL", "PretextMethod", "SimCLR"]
