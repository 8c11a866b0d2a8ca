"""Does BiSSL help on photographs of waste, from ImageNet weights? A few minutes per run on one CPU core.

TrashNet in class folders at $BISSL_ZOO_DATASETS/trashnet/{train,val,test}. All training photographs are the unlabelled
pile; `train.label_fraction` of them have labels. Give the weights of tf_efficientnet_lite0 by `train.init`.
"""

from torch.optim import SGD, AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_backbone, build_dataset

from ..common.compare import compare
from ..common.downstream.classification import task
from ..common.optim import cosine, lr_multiplier, optimizer
from ..common.pretext.simclr import pretext
from ..common.solvers.minres import solver
from ..common.train import bilevel, clip_grad, finetune, pretrain, train


def trash(split, **kwargs):
    """Return a split of the data set."""
    return L(build_dataset)(name="image_folder", root=f"trashnet/{split}", **kwargs)


dataloader = dict(
    pretext=L(build_train_loader)(dataset=trash("train", labelled=False), batch_size=64, num_workers=0),
    train=L(build_train_loader)(dataset=trash("train"), batch_size=32, num_workers=0),
    test=L(build_test_loader)(dataset=trash("test"), batch_size=64, num_workers=0),
)

backbone = L(build_backbone)(name="tf_efficientnet_lite0")
pixels = dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])  # those of the ImageNet weights
pretext.augmentation.update(size=64, crop_scale=[0.2, 1.0], **pixels)
task.update(image_size=96, **pixels)

train.output_dir = "runs/compare_trash"
train.label_fraction = 0.05  # 126 labels
train.stages = ["bissl", "finetune"]
train.log_period = 20

bilevel["lambda"] = 0.1
bilevel.lower_steps, bilevel.upper_steps, bilevel.alternations = 4, 2, 25
bilevel.curvature_batch_size = 32
bilevel.pretext_warmup.steps = 50
bilevel.head_warmup.update(steps=50, epochs=None)
finetune.steps, finetune.epochs = 100, None

optimizer.lower = L(SGD)(lr=0.02, momentum=0.9, weight_decay=1e-4)
optimizer.upper = L(AdamW)(lr=3e-4, weight_decay=1e-4)
optimizer.head_warmup = L(AdamW)(lr=3e-3, weight_decay=1e-4)
optimizer.finetune = L(AdamW)(lr=5e-4, weight_decay=1e-2)
lr_multiplier.lower = cosine(0.1, warmup_steps=5)
lr_multiplier.finetune = cosine(0.01, warmup_steps=10)

compare.update(metric="top1", seeds=10)
search = dict(  # with compare.search_trials, on the validation split
    metric="top1",
    seed=0,
    space={"optimizer.finetune.lr": [1e-4, 1e-2], "optimizer.finetune.weight_decay": [1e-5, 1e-1]},
    overrides=["dataloader.test.dataset.root=trashnet/val"],
)
