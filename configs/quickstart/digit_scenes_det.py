"""All stages in minutes on two CPU cores: digits on photographs, SimCLR, Faster R-CNN, resnet18 up to stride 8."""

from torch.optim import SGD, AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset

from ..common.backbones.resnet import resnet18 as backbone
from ..common.downstream.faster_rcnn import task
from ..common.optim import cosine, lr_multiplier, optimizer
from ..common.pretext.simclr import pretext
from ..common.solvers.minres import solver
from ..common.train import bilevel, clip_grad, finetune, pretrain, train


def digit_scenes(split):
    """Return a split of the embedded data set."""
    return L(build_dataset)(name="digit_scenes", split=split)


dataloader = dict(
    pretext=L(build_train_loader)(dataset=digit_scenes("unlabeled"), batch_size=48, num_workers=1),
    train=L(build_train_loader)(dataset=digit_scenes("train"), batch_size=16, num_workers=1),
    test=L(build_test_loader)(dataset=digit_scenes("test"), batch_size=16, num_workers=1),
)

backbone.zero_init_last = False  # residual branches initialized with zero delay a short training

train.output_dir = "runs/quickstart"
train.stages = ["pretrain", "bissl", "finetune"]
train.log_period = 20
train.publish.name = "resnet18.simclr_bissl_digit_scenes"
train.publish.licence = "Apache-2.0"

# views show digits at the detector's scale, without mirroring
pretext.augmentation.update(size=48, crop_scale=[0.15, 0.6], flip_probability=0.0)
task.flip_probability = 0.0

task.min_size = 96
task.max_size = 96
task.anchor_sizes = [16, 24, 32, 48]
task.box_head = 128
task.rpn_proposals = [200, 100]
task.roi_batch = 64
task.sampling_ratio = 1  # RoIAlign's backward pass is most of a step on CPU

bilevel["lambda"] = 0.1  # a short schedule needs a stronger pull than the paper's 0.001 over 10,000 steps
bilevel.shared_stage = "c3"
bilevel.lower_steps = 4
bilevel.upper_steps = 2
bilevel.alternations = 12
bilevel.curvature_batch_size = 16
bilevel.head_warmup.steps = 40
bilevel.head_warmup.epochs = None

pretrain.steps, pretrain.epochs = 100, None
finetune.steps, finetune.epochs = 300, None
finetune.baseline = True

optimizer.pretrain = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.lower = L(SGD)(lr=0.05, momentum=0.9, weight_decay=1e-4)
optimizer.upper = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.head_warmup = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.finetune = L(AdamW)(lr=1e-3, weight_decay=1e-4)
lr_multiplier.pretrain = cosine(0.001, warmup_steps=10)
lr_multiplier.lower = cosine(0.1, warmup_steps=5)
lr_multiplier.finetune = cosine(0.01, warmup_steps=20)
