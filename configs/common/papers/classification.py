"""BiSSL and fine-tuning on a classification set as in versions 3 to 5 of the BiSSL paper (arXiv 2410.02387).

The rates of the upper level are in the config of each data set, those of fine-tuning come from a search, whose trials
train on `train` and are tested on `val`. The final runs train on `trainval` and are tested on `test`.
"""

from ..downstream.classification import task
from ..optim import optimizer
from ..search import classification as search
from ..solvers.cg import solver
from ..train import bilevel, clip_grad, finetune
from .sets import as_in_the_papers, crops

as_in_the_papers(bilevel, finetune)
task.update(crops(96))

bilevel.head_warmup.epochs = 20
finetune.epochs = 400

search.overrides = ["dataloader.train.dataset.split=train", "dataloader.test.dataset.split=val"]
