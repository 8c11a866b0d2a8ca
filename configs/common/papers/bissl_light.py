"""BiSSLight: LoRA on MAE's ViTs and curvature from the gradients of the lower steps, without second derivatives.

Lower and upper level train low-rank additions to queries and values of one frozen backbone; fine-tuning trains all of
it. The rates of the upper level and of fine-tuning are not published; those here were not tuned.
"""

from torch.optim import SGD, AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

from ..data.imagenet import pretext as pretext_loader
from ..optim import cosine, lr_multiplier, optimizer
from ..pretext.mae import pretext
from ..solvers.mfac import solver
from ..train import bilevel, clip_grad, finetune, pretrain, train

_PATCH = dict(base=16, large=16, huge=14)


def start(size):
    """Return the backbone of this size, the weights that it starts from, and the side of its patches."""
    name = f"vit_{size}_patch{_PATCH[size]}_224"
    return L(build_backbone)(name=name), f"timm:{name}.mae", _PATCH[size]


dataloader = dict(pretext=pretext_loader)
del pretext_loader
dataloader["pretext"].batch_size = 256

bilevel.lora = dict(r=64, alpha=64, targets=["q", "v"])
bilevel.lower_head_lr = 1e-4  # of the decoder
bilevel.pretext_warmup.steps = 1000  # of a new decoder; 0 with an official checkpoint that has one
bilevel.head_warmup.epochs = 20

optimizer.lower = L(SGD)(lr=0.01, momentum=0.9, weight_decay=0.0)
optimizer.upper = L(SGD)(lr=0.01, momentum=0.9, weight_decay=0.0)
optimizer.head_warmup = L(AdamW)(lr=1e-3, weight_decay=0.0)
optimizer.finetune = L(AdamW)(lr=5e-4, weight_decay=0.05)
lr_multiplier.finetune = cosine(0.001, warmup_steps=100)

finetune.epochs = 200
finetune.baseline = True
finetune.layer_decay = 0.75

train.stages = ["bissl", "finetune"]
train.amp = "bf16"  # nothing is differentiated twice
