"""The figures of a run in Weights & Biases."""

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.progress.file_writers import METRICS_FILE, Record, Writer

logger = logging.getLogger(__name__)

#: the project where WANDB_PROJECT names no other
PROJECT = "bissl_zoo"
#: seconds that a run waits at its end until what is left is uploaded
UPLOAD = 60.0


class WandbWriter(Writer):
    """A run of Weights & Biases; where it was begun before, the same one goes on. With its config, and every record.

    Its id is kept in the run directory. Steps that a resumed run takes again are there twice, since nothing can be
    taken back. WANDB_MODE, WANDB_PROJECT and the like mean what they mean to wandb.
    """

    def __init__(self, folder: Path, cfg: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.run: Any = None
        self.defined: set[str] = set()
        self._guarded(lambda: self._open(cfg))

    def _open(self, cfg: dict[str, Any]) -> None:
        import wandb

        kept = self.folder / "wandb" / "run_id"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(secrets.token_hex(4) + "\n")
        named = {"name": self.folder.resolve().name, "project": PROJECT}
        self.run = wandb.init(
            id=kept.read_text().strip(),
            resume="allow",
            dir=self.folder,
            config=cfg,
            settings=_settings(wandb.Settings),
            **{key: value for key, value in named.items() if f"WANDB_{key.upper()}" not in os.environ},
        )
        logger.info(f"wandb: {Path(self.run.dir).parent if self.run.offline else self.run.url}")

    def begin(self, stage: str, step: int) -> None:
        """Have the stage's figures drawn over its steps."""
        self._guarded(lambda: self._over(stage, "step"))

    def _over(self, name: str, number: str) -> None:
        if self.run and name not in self.defined:
            self.defined.add(name)
            self.run.define_metric(f"{name}/{number}", hidden=True)
            self.run.define_metric(f"{name}/*", step_metric=f"{name}/{number}")

    def write(self, records: Sequence[Record], step: int) -> None:
        """Every number under its name, at the record's own."""
        if self.run:
            self._guarded(lambda: [self._log(record) for record in records])

    def _log(self, record: Record) -> None:
        # not `stage/key`, of which `stage/*` would be true as well: each figure is drawn over one step
        name, number = (f"{record.stage}_{record.key}", "number") if record.key else (record.stage, "step")
        self._over(name, number)
        figures = {f"{name}/{key}": value for key, value in record.numbers().items()}
        self.run.log({**figures, f"{name}/{number}": record.number})

    def end(self) -> None:
        """Nothing waits between stages."""

    def close(self, failed: bool) -> None:
        """End the run there, as finished or failed."""
        if self.run:
            self._guarded(lambda: self.run.finish(exit_code=int(failed)))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, the training is worth more than a copy of its figures
            self.run = None
            logger.warning(
                f"wandb: {type(error).__name__}: {error} The run goes on without it; its figures are in "
                f"{self.folder / METRICS_FILE}."
            )


def _settings(known: Any) -> Any:
    """Those of a run that has a display of its own, and ends though nobody answers."""
    wanted = dict(console="off", silent=True, finish_timeout=UPLOAD)
    return known(**{key: value for key, value in wanted.items() if key in known.model_fields})
