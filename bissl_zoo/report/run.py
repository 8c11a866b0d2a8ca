"""The report of one run: its sections, each from the files of its directory, its data sets or its model."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, config_root, load_config, with_defaults
from bissl_zoo.engine.evaluate import read_details
from bissl_zoo.engine.hooks import SKIPPED
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.registry import STAGES
from bissl_zoo.report import IMAGES
from bissl_zoo.report.charts import decimals, detail_blocks, draw_curves, in_time
from bissl_zoo.report.history import History, Series, read_history, time_of
from bissl_zoo.report.page import (
    Block,
    Chart,
    Fold,
    Note,
    Section,
    Sections,
    Table,
    Text,
    embed,
    footer,
    render,
    save_page,
    shown,
)  # fmt: skip
from bissl_zoo.report.visualize import RunImages
from bissl_zoo.runs.directory import LOG_FILE, METRICS_FILE, load_run_config, read_metadata
from bissl_zoo.runs.listing import FINISHED, RunState, is_run, look_at, verdict

#: sections with defaults in common/train.py
PLAIN = ("train", "pretrain", "bilevel", "finetune", "clip_grad")
#: metrics of evaluations during fine-tuning that are drawn
MAX_EVALUATIONS = 3
#: maximum bytes of a text file that are read
_LIMIT = 4 << 20
FILES_ONLY = "Left out, since only the files of the run are read (--files-only)."
#: charts of the hypergradient: metrics, label, caption, options
_HYPERGRADIENT = [
    (["solver/residual"], "relative residual", "Residual of the solve.", {"log": True}),
    (["solver/products"], "products", "Products with the curvature matrix per upper step.", {}),
    (["solver/cos_xv"], "cosine", "Cosine between x and v; 1 means that curvature had no effect.", {}),
    (["solver/norm_ratio"], "|x| / |v|", "Norm of x over that of v; above 1, negative curvature was amplified.", {}),
    (
        ["solver/v_norm", "solver/x_norm", "solver/plain_norm"],
        "norm",
        "Norms: of the upper gradient v at the lower backbone, of the solution x, and of the plain gradient.",
        {"log": True},
    ),
]
_LOSSES = {
    "total_loss": "",
    "lower/total_loss": " of the pretext level",
    "upper/total_loss": " of the downstream level",
}
_PROBES = [
    (["probe/knn_top1", "probe/linear_top1"], "top-1 (fraction)", "kNN and linear accuracy"),
    (["probe/effective_rank"], "effective rank", "Effective rank of the embedding"),
]
_FINETUNE = "finetune"


@dataclass(frozen=True)
class View:
    """The content of a page for one run; `problems`: how many parts could not be made."""

    name: str
    state: str
    verdict: list[str]
    summary: list[tuple[str, str]]
    sections: list[Section]
    problems: int


class RunReport:
    """The run in `folder`, read once.

    Args:
        images: maximum number of images of a data set; 0 builds nothing that the config names.
        ended: this process has finished the run and still holds its lock.
    """

    def __init__(self, folder: Path, images: int, ended: bool = False) -> None:
        self.folder, self.images = folder, images
        self.name = folder.absolute().name
        self.state: RunState = look_at(folder)
        if ended:
            self.state.state, self.state.writer = FINISHED, None
        self.history: History = read_history(folder / METRICS_FILE)
        self.run_images = RunImages(folder, images)

    @cached_property
    def cfg(self) -> DictConfig:
        """Return the config that the run wrote; nothing that it names is imported."""
        return load_run_config(self.folder)

    def view(self) -> View:
        """Return all sections."""
        report = Sections(self.name)
        report.add("Results", self.problems, self.results)
        report.add("Predictions", self.drawn(self.run_images.predictions))
        report.add("Training", self.losses, self.evaluations, self.probes)
        report.add("Hypergradient", self.hypergradient)
        report.add("Classes", self.tests)
        report.add("Features", self.drawn(self.run_images.embeddings))
        report.add("Data", self.datasets, self.drawn(self.run_images.data), self.drawn(self.run_images.views))
        report.add("Stages and config", self.stages, self.configuration)
        report.add("Environment and zoo entry", self.environment, self.entry)
        problems = sum(isinstance(b, Note) and b.problem for section in report.sections for b in section.blocks)
        return View(self.name, self.state.state, self.verdict(), self.summary(), report.sections, problems)

    def drawn(self, make: Callable[[], list[Block]]) -> Callable[[], list[Block]]:
        """Return `make` or, if only files are read, a function that returns the reason."""
        return make if self.images else lambda: [Note(FILES_ONLY)]

    def summary(self) -> list[tuple[str, str]]:
        """Return the first lines of the report."""
        run, metadata = self.state, self.state.metadata
        wall = metadata.get("wall_time_s")
        lines = {
            "folder": str(self.folder),
            "written by": run.writer,
            "hardware": metadata.get("hardware"),
            "wall time": f"{in_time(wall)}, without parts that were killed" if wall else None,
            "size": f"{run.size / 1e6:,.1f} MB",
            "published": run.entry.get("name"),
        }
        return [(key, str(value)) for key, value in lines.items() if value]

    def verdict(self) -> list[str]:
        """Return what the run has shown, and the sentence about the hypergradients of its bilevel stage."""
        text = verdict(self.state.results)
        if not text and self.state.state == FINISHED:
            text = "The run is complete. It has no stage finetune, so there are no test results."
        text = text or f"There are no results yet: the run is in the state \u201c{self.state.state}\u201d."
        sentences = [entry.metrics["summary"] for entry in self.history.entries if "summary" in entry.metrics]
        return [text, *sentences[-1:]]

    def problems(self) -> list[Block]:
        """Return what is wrong with the run directory."""
        problems = [*self.state.problems, self.history.problem.strip()]
        return [Note(problem, problem=True) for problem in problems if problem]

    def results(self) -> list[Block]:
        """Return the table of the test set."""
        results = self.state.results
        names = [m for m in dict.fromkeys(m for metrics in results.values() for m in metrics) if "/" not in m]
        rows = [[start, *(decimals(metrics.get(name)) for name in names)] for start, metrics in results.items()]
        for _, stage in STAGES:
            if {stage.label, stage.baseline_label} <= results.keys():
                before, after = results[stage.baseline_label], results[stage.label]
                both = [after[name] - before[name] if name in before and name in after else None for name in names]
                title = f"{stage.label} minus {stage.baseline_label}"
                rows.append([title, *("\u2013" if d is None else f"{d:+.4f}" for d in both)])
        caption = "Metrics on the test set, fractions."
        header = ["fine-tuned from", *names]
        return [Table(header, rows, caption, range(1, 1 + len(names)), wide=len(names) > 4)] if rows else []

    def stages(self) -> list[Block]:
        """Return progress and time of each stage."""
        times = {item.name: item for item in time_of(self.history)}
        rows = []
        for stage in self.state.stages:
            row: list[Any] = [stage.name, stage.step, stage.total, "yes" if stage.done else "no"]
            item = times.get(stage.name)
            if item:
                parts = (item.seconds, item.evaluating, item.waiting, item.saving)
                row += [*map(in_time, parts), item.speed if item.speed > 0 else None]
            rows.append(row + [None] * (9 - len(row)))
        header = ["stage", "step", "of", "done", "time", "evaluating", "waiting for data", "checkpoints", "images/s"]
        caption = "Stages; a step of bissl is an alternation. Time without start, test and publishing."
        return [Table(header, rows, caption, [1, 2, *range(4, 9)], wide=True)] if rows else []

    def configuration(self) -> list[Block]:
        """Return how the config differs from its base; all of it is folded."""
        base, rows = changed_keys(self.cfg, read_text(self.folder / "environment.txt"))
        table = Table(["key", "base", "this run"], rows, f"Keys that differ from {base}.")
        block: Block = table if rows else Note(f"The config is {base} without changes.")
        return [block, Fold("The whole config", [Text(LazyConfig.to_py(self.cfg))])]

    def datasets(self) -> list[Block]:
        """Return the data sets with their sizes, and how many images could not be decoded."""
        counts = {stage: self.history.series(SKIPPED, stage).y for stage in self.history.stages()}
        skipped = ", ".join(f"{counts[stage][-1]:.0f} in {stage}" for stage in counts if counts[stage])
        text = f"Images that could not be decoded and were replaced by others: {skipped}. {LOG_FILE} names them."
        rows = [
            [role, item.get("name"), item.get("root"), item.get("split") or item.get("splits"), item.get("samples")]
            for role, item in read_metadata(self.folder).get("datasets", {}).items()
        ]
        header = ["role", "data set", "root", "split", "images"]
        table = [Table(header, rows, "Data sets of the run.", [4])] if rows else []
        return [*([Note(text, problem=True)] if skipped else []), *table]

    def losses(self) -> list[Block]:
        """Return the losses of each stage, those of all fine-tunings in one chart."""
        blocks: list[Block] = []
        for stage in self.history.stages():
            for key, level in _LOSSES.items() if not stage.startswith(_FINETUNE) else ():
                curves = self._curves([key], stage, upper=True)
                x_label = f"upper steps of {stage}" if curves else self._steps_of(stage)
                curves = curves or self._curves([key], stage)
                if curves:
                    blocks.append(_chart(draw_curves(curves, x_label, "loss"), f"Loss{level}, {stage}."))
        return [*blocks, *self._finetunings("total_loss", "loss")] or [Note("No loss has been written yet.")]

    def _finetunings(self, key: str, y_label: str) -> list[Block]:
        """Return a chart of a metric of all fine-tunings."""
        curves = {}
        for stage in filter(lambda stage: stage.startswith(_FINETUNE), self.history.stages()):
            start = stage.partition("_")[2] or next(reversed(self.state.results), stage)
            curves[f"from {start}"] = self.history.series(key, stage)
        curves = {name: series for name, series in curves.items() if series.x}
        chart = draw_curves(curves, "steps of fine-tuning", y_label) if curves else None
        return [_chart(chart, f"{y_label[0].upper()}{y_label[1:]} during fine-tuning.")] if chart else []

    @staticmethod
    def _steps_of(stage: str) -> str:
        return f"{'alternations' if alternates(stage) else 'steps'} of {stage}"

    def evaluations(self) -> list[Block]:
        """Return the evaluations during fine-tuning."""
        names = self.history.names("val/", "test/")[:MAX_EVALUATIONS]
        blocks = [block for name in names for block in self._finetunings(name, shown(name))]
        return blocks or [Note("No evaluations during training (finetune.eval_period is null or was not reached).")]

    def _curves(self, names: Sequence[str], stage: str, upper: bool = False) -> dict[str, Series]:
        curves = {name: self.history.series(name, stage, upper) for name in names}
        return {name: series for name, series in curves.items() if series.x}

    def hypergradient(self) -> list[Block]:
        """Return how well the linear systems were solved, at what cost, and the resulting gradients."""
        stage = next(filter(alternates, self.history.stages()), None)
        if stage is None:
            return [Note("There are no records of a bilevel stage.")]
        tolerance = OmegaConf.select(self.cfg, "solver.tolerance")
        blocks: list[Block] = []
        for keys, y_label, caption, options in _HYPERGRADIENT:
            curves = self._curves(keys, stage, upper=True)
            if curves:
                level = tolerance if keys == ["solver/residual"] and type(tolerance) is float else None
                blocks.append(_chart(draw_curves(curves, "upper steps", y_label, level=level, **options), caption))
        statuses: dict[str, int] = {}
        for entry in self.history.of(stage, upper=True):
            status = str(entry.metrics.get("solver/status", "unknown"))
            statuses[status] = statuses.get(status, 0) + 1
        table = Table(["status", "upper steps"], list(statuses.items()), "Status of the solves.", [1])
        return blocks + ([table] if statuses else [])

    def probes(self) -> list[Block]:
        """Return the quality of the embedding and signs of collapse over time."""
        blocks: list[Block] = []
        for stage in self.history.stages():
            x_label = self._steps_of(stage)
            for keys, y_label, caption in _PROBES:
                curves = self._curves(keys, stage)
                if curves:
                    blocks.append(_chart(draw_curves(curves, x_label, y_label), f"{caption}, {stage}."))
        return blocks or [Note("Features were not probed during training (train.probe.period is 0).")]

    def tests(self) -> list[Block]:
        """Return the last evaluation by class."""
        return detail_blocks(read_details(self.folder))

    def environment(self) -> list[Block]:
        """Return versions and hardware."""
        text = read_text(self.folder / "environment.txt")
        rows = [line.partition(": ")[::2] for line in text.splitlines() if ": " in line]
        return [Table(["", ""], rows, "Environment.")] if rows else [Note("There is no environment.txt.")]

    def entry(self) -> list[Block]:
        """Return the published zoo entry."""
        if not self.state.entry:
            return [Note("The run has published nothing to a zoo.")]
        return [Table(["", ""], [[key, value] for key, value in self.state.entry.items()], "Zoo entry.")]


def write_report(folder: Path, output: Path, images: int = IMAGES, ended: bool = False) -> int:
    """Write the report of a run atomically.

    Args:
        folder: run directory in any state.
        images: maximum number of images of a data set; 0 reads only the files of the run and builds nothing that its
            config names.
        ended: this process has finished the run and still holds its lock.
    Returns:
        The number of parts that could not be made; the page and a warning show the reason of each.
    Raises:
        CheckpointError: the folder is not a run directory.
        ConfigError: `output` cannot be written.
    """
    if not is_run(folder):
        raise CheckpointError(f"There is no run in {folder} (no config.yaml). Give the directory of a run.")
    view = RunReport(folder, images, ended).view()
    save_page(render("run.html", view=view, footer=footer()), output)
    return view.problems


def _chart(figure: Figure, caption: str) -> Chart:
    return Chart(embed(figure, caption), caption)


def changed_keys(cfg: DictConfig, environment: str) -> tuple[str, list[list[Any]]]:
    """Return the name of the base config of a run, and key, base value and value where `cfg` differs from it.

    The base is the shipped config on the command line of the run or, without one, the defaults. No other config is
    opened: configs are programs, and the run may come from a stranger.

    Args:
        environment: text of the run's `environment.txt`.
    """
    name = shipped_config(environment)
    base = with_defaults(load_config(config_root() / name)) if name else load_config("common/train.py")
    before, after = (_leaves(OmegaConf.to_container(each, resolve=False)) for each in (base, cfg))
    keys = [key for key in {**before, **after} if name or key.split(".")[0] in PLAIN]
    rows = [[key, before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)]
    return f"configs/{name or 'common/train.py'}", [row for row in rows if row[0] != "train.output_dir"]


def shipped_config(environment: str) -> str | None:
    """Return the config in `configs/` that the command of a run names, or None."""
    match = re.search(r"^command: (.*)$", environment, re.MULTILINE)
    try:
        words = shlex.split(match[1]) if match else []
    except ValueError:  # unbalanced quotes
        return None
    place = words.index("--config-file") + 1 if "--config-file" in words else len(words)
    name = words[place].removeprefix("configs/") if place < len(words) else ""
    shipped = {path.relative_to(config_root()).as_posix() for path in config_root().rglob("*.py")}
    return name if name in shipped else None


def _leaves(node: Any, key: str = "") -> dict[str, Any]:
    """Return the values of a config by dotted key; lists are values."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {k: v for name, value in node.items() for k, v in _leaves(value, f"{key}.{name}".lstrip(".")).items()}


def read_text(path: Path) -> str:
    """Return the first 4 MiB of a text file of a run directory; empty if there is no file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
