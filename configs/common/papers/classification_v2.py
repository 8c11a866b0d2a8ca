"""BiSSL and fine-tuning on a classification set as in versions 1 and 2 of the BiSSL paper (arXiv 2410.02387)."""

from .classification import bilevel, clip_grad, finetune, optimizer, search, solver, task

bilevel.gamma = 0.01
bilevel.adaptation = dict(every=100, alpha=0.1)
optimizer.upper.update(lr=0.015, weight_decay=0.01)  # for all data sets
