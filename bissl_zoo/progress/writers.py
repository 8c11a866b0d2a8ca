"""The writers of a run's figures, as `train.writers` names them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.distributed import is_main_process
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.progress.file_writers import METRICS_FILE, JsonWriter, TensorBoardWriter, Writer
from bissl_zoo.progress.wandb_writer import WandbWriter

NAMES = ("json", "tensorboard", "wandb")


def check_writers(names: Sequence[str], source: str) -> None:
    """Whether the writers named are there.

    Raises:
        ConfigError: one that does not exist, or whose library is missing; `json` is left out.
    """
    for name in names:
        if name not in NAMES:
            hint = did_you_mean(str(name), NAMES)
            raise ConfigError(f"{source}: train.writers has '{name}'.{hint} Writers: {', '.join(NAMES)}.")
    if "json" not in names:
        raise ConfigError(
            f"{source}: train.writers is {list(names)}; json cannot be left out, since a run that is resumed or shown "
            f"is read from {METRICS_FILE}. Add it, as in train.writers=[json{''.join(f',{name}' for name in names)}]."
        )
    if "wandb" in names:
        try:
            from wandb import Settings  # noqa: F401, which a folder named wandb has not
        except ImportError as error:
            raise ConfigError(
                f"{source}: train.writers has wandb, which is not installed ({error}). Install it by "
                'pip install "bissl_zoo[wandb]", or leave it out.'
            ) from error


@contextlib.contextmanager
def open_writers(cfg: DictConfig, folder: Path) -> Iterator[list[Writer]]:
    """The writers of a run, in the main process; none of those with a network in the others."""
    names = cfg.train.writers
    writers: list[Writer] = [JsonWriter(folder, cfg.train.log_period)]
    if "tensorboard" in names:
        writers.append(TensorBoardWriter(folder))
    if "wandb" not in names or not is_main_process():
        yield writers
        return
    writer = WandbWriter(folder, OmegaConf.to_container(cfg, resolve=True))
    failed = True
    try:
        yield [*writers, writer]
        failed = False
    finally:
        writer.close(failed)
