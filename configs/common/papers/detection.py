"""The search of VOC07+12 detection: the BiSSL paper's ranges, on both years' `train` and `val`."""

from ..search import detection as search

search.overrides = [
    "dataloader.train.dataset.splits=[2007_train,2012_train]",
    "dataloader.test.dataset.splits=[2007_val,2012_val]",
]
