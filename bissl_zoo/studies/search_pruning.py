"""When a trial is given up: it is worse on the way than half of those that are finished were at the same step."""

import json
from pathlib import Path
from statistics import median

from bissl_zoo.progress.file_writers import METRICS_FILE

#: finished trials before any is given up, as in Optuna's MedianPruner (Akiba et al., arXiv 1907.10902)
STARTUP = 5


class Curve:
    """A figure of a running or finished fine-tuning by the step after which it was measured.

    Args:
        metric: its name in `metrics.jsonl`, such as `val/AP50`.
    """

    def __init__(self, run_dir: Path, metric: str) -> None:
        self.path, self.metric = run_dir / METRICS_FILE, metric
        self.values: dict[int, float] = {}
        self._read = 0

    def update(self) -> dict[int, float]:
        """Read what was written since the last time."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read:  # a resumed run has dropped lines
            self.values, self._read = {}, 0
        if size > self._read:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):  # it is being written
                        break
                    self._read += len(line)
                    self._take(line)
        return self.values

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # the run tells of it when it is resumed
            return
        value = record.get(self.metric)
        if record.get("stage") == "finetune" and isinstance(value, float):
            self.values[record["step"]] = value


class MedianPruner:
    """Gives up a trial whose best value so far is below the median of the finished trials at its last evaluation.

    Args:
        runs: the folder that holds the run directories.
        metric: as for `Curve`; the higher the better.
    """

    def __init__(self, runs: Path, metric: str) -> None:
        self.runs, self.metric = runs, metric
        self.finished: set[str] = set()
        self.curves: dict[str, Curve] = {}

    def curve(self, name: str) -> dict[int, float]:
        """The figure of a trial by step, up to now."""
        if name not in self.curves:
            self.curves[name] = Curve(self.runs / name, self.metric)
        return self.curves[name].update()

    def reason(self, name: str) -> str | None:
        """Why the trial is to be given up now; None where it goes on."""
        values = self.curve(name)
        if not values or len(self.finished) < STARTUP:
            return None
        step = max(values)
        others = [curve[step] for curve in map(self.curve, self.finished - {name}) if step in curve]
        best = max(values.values())
        if len(others) < STARTUP or best >= median(others):
            return None
        return f"{self.metric} {best:.4f} is below {median(others):.4f}, the median at step {step}"
