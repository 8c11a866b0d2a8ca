"""DINO with the numbers of its paper (arXiv 2104.14294), at 96 pixels."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.views import multi_crop
from bissl_zoo.registry import build_pretext

pretext = L(build_pretext)(
    name="dino",
    projector=[2048, 2048, 256, 65536],
    student_temperature=0.1,
    teacher_temperature=0.04,
    center_decay=0.9,
    decay=0.996,
    augmentation=L(multi_crop)(size=96, local_size=48, local_crops=8),
)
