"""BiSSL and fine-tuning on a classification set as in versions 3 to 5 of the BiSSL paper (arXiv 2410.02387).

The upper level's rates are in each set's own config. Those of fine-tuning come from the search, whose trials train on
`train` and test on `val`. What the last runs train on is left open: here `trainval`, to be tested on `test`.
"""

from ..downstream.classification import task
from ..optim import optimizer
from ..search import classification as search
from ..solvers.cg import solver
from ..train import bilevel, clip_grad, finetune

bilevel.head_warmup.epochs = 20

finetune.epochs = 400
finetune.baseline = True

search.overrides = ["dataloader.train.dataset.split=train", "dataloader.test.dataset.split=val"]
