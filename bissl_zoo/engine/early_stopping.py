"""The hook that remembers the best weights of a fine-tuning and ends it when they have not become better for long."""

from bissl_zoo.engine.trainer import HookBase
from bissl_zoo.progress.display import say


class EarlyStopping(HookBase):
    """Keep the weights of the highest `val/<metric>`; those of equal height that came first.

    What is remembered is part of the trainer's state, so that a resumed run decides as one that was not interrupted.

    Args:
        patience: evaluations without a better one after which the stage ends; None to go on to its last step.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric, self.patience = f"val/{metric}", patience

    def after_step(self) -> None:
        """Compare where there was an evaluation; placed after it, and before the writer and the checkpoint."""
        trainer = self.trainer
        value = trainer.metrics.get(self.metric)
        if value is None:
            return
        best = trainer.best
        if best is None or value > best["value"]:
            trainer.remember(value)
            return
        best["since"] += 1
        if self.patience and best["since"] >= self.patience and not trainer.done:
            trainer.ended = True
            say(
                f"[{trainer.name} {trainer.step}/{trainer.total_steps}] {self.metric} was best at step {best['step']} "
                f"({best['value']:.4f}) and no better at {best['since']} evaluations since: the stage ends"
            )
