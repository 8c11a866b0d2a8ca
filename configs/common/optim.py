"""Optimizers and schedules of the BiSSL paper; the rates of the upper level are set per data set."""

from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler
from timm.optim import Lars
from torch.optim import SGD

from bissl_zoo.config import LazyCall as L
from bissl_zoo.optim import LRMultiplier

# always_adapt: otherwise timm's Lars takes steps of plain SGD, 100 times longer, if weight_decay is 0
optimizer = dict(
    pretrain=L(Lars)(lr=4.8, momentum=0.9, weight_decay=1e-6, trust_coeff=0.001, always_adapt=True),
    lower=L(Lars)(lr=1.0, momentum=0.9, weight_decay=1e-6, trust_coeff=0.001, always_adapt=True),
    upper=L(SGD)(lr=0.015, momentum=0.9, weight_decay=0.001),
    head_warmup=L(SGD)(lr="${optimizer.upper.lr}", momentum=0.9, weight_decay="${optimizer.upper.weight_decay}"),
    finetune=L(SGD)(lr=0.01, momentum=0.9, weight_decay=0.001),
)


def cosine(end_value, warmup_steps=0):
    """Return a cosine from 1 to `end_value` after a linear warm-up."""
    return L(LRMultiplier)(
        scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=end_value), warmup_steps=warmup_steps
    )


lr_multiplier = dict(
    pretrain=cosine(0.001, warmup_steps=10 * 1251),  # 10 epochs of ImageNet at batch 1024
    lower=cosine(0.001, warmup_steps=10 * 20),  # 10 alternations
    upper=cosine(0.001),
    head_warmup=L(LRMultiplier)(scheduler=L(ConstantParamScheduler)(value=1.0)),
    finetune=cosine(0.001),
)
