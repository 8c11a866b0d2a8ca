"""Configs: lazy calls (`LazyCall`), config files and overrides."""

from bissl_zoo.config.files import config_root
from bissl_zoo.config.lazy import LazyCall, instantiate, locate
from bissl_zoo.config.load import LazyConfig, load_config, with_defaults

__all__ = ["LazyCall", "LazyConfig", "config_root", "instantiate", "load_config", "locate", "with_defaults"]
