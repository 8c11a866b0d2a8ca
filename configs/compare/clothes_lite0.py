"""`trash.py` on photographs of clothes: folders by class at $BISSL_ZOO_DATASETS/clothing10/{train,val,test}.

Give the weights of tf_efficientnet_lite0 by `train.init`.
"""

from .trash import (
    backbone,
    bilevel,
    clip_grad,
    compare,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    search,
    solver,
    task,
    train,
)

for role, split in {"pretext": "train", "train": "train", "test": "test"}.items():
    dataloader[role].dataset.root = f"clothing10/{split}"

train.output_dir = "runs/compare_clothes_lite0"
train.label_fraction = 0.25  # about 700 labels
finetune.steps = 200
search.overrides = ["dataloader.test.dataset.root=clothing10/val"]
