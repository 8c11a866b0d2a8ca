"""The whole walk in minutes on two CPU cores: digits on photographs, SimCLR, Faster R-CNN, resnet18 to stride 8."""

from torch.optim import SGD, AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset

from ..common.backbones.resnet import resnet18 as backbone
from ..common.downstream.faster_rcnn import task
from ..common.optim import cosine, lr_multiplier, optimizer
from ..common.pretext.simclr import pretext
from ..common.solvers.cg import solver
from ..common.train import bilevel, clip_grad, finetune, pretrain, train


def digit_scenes(split):
    """One split of the embedded data set."""
    return L(build_dataset)(name="digit_scenes", split=split)


dataloader = dict(
    pretext=L(build_train_loader)(dataset=digit_scenes("unlabeled"), batch_size=64, num_workers=1),
    train=L(build_train_loader)(dataset=digit_scenes("train"), batch_size=16, num_workers=1),
    test=L(build_test_loader)(dataset=digit_scenes("test"), batch_size=16, num_workers=1),
)

train.output_dir = "runs/quickstart"
train.stages = ["pretrain", "bissl", "finetune"]
train.log_period = 20
train.publish.name = "resnet18.simclr_bissl_digit_scenes"
train.publish.licence = "Apache-2.0"

# digits must stay legible in a view: crops are larger, and views smaller, than on photographs
pretext.augmentation.size = 64
pretext.augmentation.crop_scale = [0.3, 1.0]

task.min_size = 96
task.max_size = 96
task.anchor_sizes = [16, 24, 32, 48]
task.box_head = 128
task.rpn_proposals = [200, 100]
task.roi_batch = 64

bilevel["lambda"] = 0.1  # a short schedule needs a stronger pull than the paper's 0.001 over 10,000 steps
bilevel.shared_stage = "c3"
bilevel.lower_steps = 5
bilevel.upper_steps = 2
bilevel.alternations = 20
bilevel.head_warmup.steps = 40
bilevel.head_warmup.epochs = None

pretrain.steps, pretrain.epochs = 120, None
finetune.steps, finetune.epochs = 300, None
finetune.baseline = True

optimizer.pretrain = L(SGD)(lr=0.1, momentum=0.9, weight_decay=1e-4)
optimizer.lower = L(SGD)(lr=0.05, momentum=0.9, weight_decay=1e-4)
optimizer.upper = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.head_warmup = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.finetune = L(AdamW)(lr=1e-3, weight_decay=1e-4)
lr_multiplier.pretrain = cosine(0.001, warmup_steps=10)
lr_multiplier.lower = cosine(0.1, warmup_steps=5)
lr_multiplier.finetune = cosine(0.01, warmup_steps=20)
