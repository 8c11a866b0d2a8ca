"""BiSSL: align a self-supervised backbone with its downstream task before fine-tuning (arXiv 2410.02387)."""

__version__ = "0.1.0"

from bissl_zoo import bilevel, data, downstream, pretext  # noqa: F401  (importing them registers what they hold)
from bissl_zoo.config import load_config
from bissl_zoo.registry import BACKBONES, DATASETS, DOWNSTREAM_TASKS, HYPERGRADIENT_SOLVERS, PRETEXT_METHODS
from bissl_zoo.zoo import create_backbone, get_config, get_entry, list_backbones

__all__ = [
    "BACKBONES",
    "DATASETS",
    "DOWNSTREAM_TASKS",
    "HYPERGRADIENT_SOLVERS",
    "PRETEXT_METHODS",
    "create_backbone",
    "get_config",
    "get_entry",
    "list_backbones",
    "load_config",
]
