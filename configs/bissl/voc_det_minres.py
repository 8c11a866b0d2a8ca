"""voc_det with recycled minimal residuals and automatic damping, so that each solve reaches its tolerance."""

from ..common.solvers.minres import solver
from .voc_det import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    search,
    task,
    train,
)

train.output_dir = "runs/voc_det_minres"
