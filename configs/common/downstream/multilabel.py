"""Multi-label classification; the BiSSL authors use loss="softmax" for VOC2007."""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_task

task = L(build_task)(name="multilabel_classification", image_size=96, loss="bce")
