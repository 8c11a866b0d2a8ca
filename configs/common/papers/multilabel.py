"""Multi-label classification in the BiSSL paper (arXiv 2410.02387); the authors use loss="softmax" for VOC2007."""

from ..downstream.multilabel import task
from .sets import crops

task.update(crops(96))
