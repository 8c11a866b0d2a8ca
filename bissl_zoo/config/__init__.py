"""Configs: lazy calls (`LazyCall`), config files and overrides."""

from bissl_zoo.config.files import config_root
from bissl_zoo.config.lazy import LazyCall, instantiate, locate, partial
from bissl_zoo.config.load import LazyConfig, load_config, with_defaults

__all__ = ["LazyCall", "LazyConfig", "config_root", "instantiate", "load_config", "locate", "partial", "with_defaults"]
