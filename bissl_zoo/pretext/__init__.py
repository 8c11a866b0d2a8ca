"""Self-supervised methods, the lower level of BiSSL: one method per file, registered in `PRETEXT_METHODS`."""

from bissl_zoo.pretext.barlow_twins import BarlowTwins
from bissl_zoo.pretext.byol import BYOL
from bissl_zoo.pretext.dino import DINO
from bissl_zoo.pretext.mae import MAE
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.moco_v2 import MoCoV2
from bissl_zoo.pretext.moco_v3 import MoCoV3
from bissl_zoo.pretext.simclr import SimCLR
from bissl_zoo.pretext.simmim import SimMIM
from bissl_zoo.pretext.simsiam import SimSiam
from bissl_zoo.pretext.vicreg import VICReg

__all__ = [
    "BYOL",
    "BarlowTwins",
    "DINO",
    "MAE",
    "MoCoV2",
    "MoCoV3",
    "PretextMethod",
    "SimCLR",
    "SimMIM",
    "SimSiam",
    "VICReg",
]
