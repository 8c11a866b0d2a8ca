"""The report of one run: its chapters, each from the files of its directory, its data sets or its model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.evaluate import DETAILS_FILE, Details, read_details
from bissl_zoo.engine.hooks import SKIPPED
from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress.file_writers import METRICS_FILE
from bissl_zoo.progress.run_log import LOG_FILE
from bissl_zoo.report.charts import Curves, draw_curves, draw_losses, draw_timing, in_time
from bissl_zoo.report.config import differences, parts_of, read_text
from bissl_zoo.report.evaluation import detail_blocks
from bissl_zoo.report.history import MOST_FIGURES, Axis, History, Series, make_axis, read_history
from bissl_zoo.report.page import Block, Chapters, Fold, Note, Picture, Section, Table, Text, reason_of
from bissl_zoo.report.pictures import RunPictures
from bissl_zoo.report.svg import to_svg
from bissl_zoo.report.timing import time_of
from bissl_zoo.runs.directory import load_run_config, read_metadata
from bissl_zoo.runs.listing import FINISHED, RunState, look_at

FILES_ONLY = "Left out, since only the files of the run were to be read (--files-only)."


@dataclass(frozen=True)
class View:
    """What a page shows of one run."""

    name: str
    state: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    problems: int


class RunReport:
    """The run in `folder`, read once.

    Args:
        images: most of a data set that are looked at; 0: nothing that the config names is built.
        number: of the run on the page.
        ended: this process has run it to its end, and still holds its lock.
    """

    def __init__(self, folder: Path, images: int, number: int = 0, ended: bool = False) -> None:
        self.folder, self.images, self.prefix = folder, images, f"r{number}"
        self.name = folder.absolute().name
        self.state: RunState = look_at(folder, whole=False)
        if ended:
            self.state.state, self.state.writer = FINISHED, None
        self.history: History = read_history(folder / METRICS_FILE)
        self.pictures = RunPictures(folder, images, self.prefix)

    @cached_property
    def cfg(self) -> DictConfig:
        """The config as the run wrote it, with defaults; nothing that it names is imported."""
        return load_run_config(self.folder)

    @cached_property
    def axis(self) -> Axis:
        """Of the losses; where the config cannot be read, an alternation counts as one step of each level."""
        try:
            steps = [OmegaConf.select(self.cfg, f"bilevel.{key}") for key in ("lower_steps", "upper_steps")]
        except Exception:  # the chapter on what was run tells why
            steps = [1, 1]
        counts = [step if type(step) is int and 0 < step < 1 << 31 else 1 for step in steps]
        return make_axis(self.history, *counts)

    def view(self) -> View:
        """All chapters."""
        chapters = Chapters(self.name)
        chapters.add("Results", self.results, self.stages)
        chapters.add("What was run", self.configuration)
        chapters.add("Data", self.data_facts, self.drawn(self.pictures.data), self.drawn(self.pictures.views))
        chapters.add("Training", self.losses, self.evaluations)
        chapters.add("Hypergradient", self.hypergradient)
        chapters.add("Features", self.probes, self.drawn(self.pictures.embeddings))
        chapters.add("Test set", self.tests)
        chapters.add("Predictions", self.drawn(self.pictures.predictions))
        chapters.add("Time", self.timing)
        chapters.add("Environment and zoo entry", self.environment, self.entry)
        problems = sum(isinstance(b, Note) and b.problem for section in chapters.sections for b in section.blocks)
        return View(self.name, self.state.state, self.head(), chapters.sections, problems)

    def drawn(self, make: Callable[[], list[Block]]) -> Callable[[], list[Block]]:
        """`make`, or why nothing is built."""
        return make if self.images else lambda: [Note(FILES_ONLY)]

    def chart(self, figure: Figure, name: str, caption: str) -> Picture:
        """A chart with a name of its own on the page."""
        return Picture(to_svg(figure, f"{self.prefix}-{name}", caption), caption)

    def head(self) -> list[tuple[str, str]]:
        """The run in a few lines."""
        run, facts = self.state, self.state.metadata
        wall = facts.get("wall_time_s")
        told = {
            "folder": str(self.folder),
            "written by": run.writer,
            "hardware": facts.get("hardware"),
            "wall time": in_time(wall) + ", without parts that were killed" if wall else None,
            "size": f"{run.size / 1e6:,.1f} MB",
            "published": run.entry.get("name"),
        }
        return [(key, str(value)) for key, value in told.items() if value]

    def results(self) -> list[Block]:
        """The table of the test set, and what else is worth knowing of the state."""
        blocks: list[Block] = [Note(problem, problem=True) for problem in self.state.problems]
        blocks += [Note(self.history.problem.strip(), problem=True)] if self.history.problem else []
        results = self.state.results
        names = [m for m in dict.fromkeys(m for figures in results.values() for m in figures) if "/" not in m]
        rows: list[list[Any]] = [[start, *(one.get(name) for name in names)] for start, one in results.items()]
        if {"pretrained", "bissl"} <= results.keys():
            before, after = results["pretrained"], results["bissl"]
            both = [after[name] - before[name] if name in before and name in after else None for name in names]
            rows.append(["bissl less pretrained", *("\u2013" if d is None else f"{d:+.4f}" for d in both)])
        if rows:
            caption = "Figures on the test set, fractions; a single seed says nothing about chance."
            numbers = range(1, 1 + len(names))
            return [*blocks, Table(["fine-tuned from", *names], rows, caption, numbers, wide=len(names) > 4)]
        if self.state.state == FINISHED:
            return [*blocks, Note("The run is complete, and fine-tuned nothing that could be tested.")]
        return [*blocks, Note(f"There are no results yet: the run is in the state \u201c{self.state.state}\u201d.")]

    def stages(self) -> list[Block]:
        """How far each stage is."""
        rows = [
            [stage.name, stage.step, stage.total, "yes" if stage.done else "no", len(stage.checkpoints)]
            for stage in self.state.stages
        ]
        header = ["stage", "step", "of", "done", "checkpoints"]
        return [Table(header, rows, "Stages; a step of bissl is an alternation.", [1, 2, 4])] if rows else []

    def configuration(self) -> list[Block]:
        """How the config differs from its base first, all of it folded."""
        told = differences(self.cfg, read_text(self.folder / "environment.txt"))
        rows = [[one.key, one.base, one.value] for one in told.changed]
        caption = f"Keys that differ from {told.base}."
        blocks: list[Block] = [Table(["key", "there", "in this run"], rows, caption)] if rows else []
        if not rows:
            blocks.append(Note(f"The run is that of {told.base}, without a difference."))
        parts = Fold("The parts of the run", [Table(["section", "call"], parts_of(self.cfg), wide=True)])
        return [*blocks, parts, Fold("The whole config", [Text(LazyConfig.to_py(self.cfg))])]

    def data_facts(self) -> list[Block]:
        """The data sets with their sizes."""
        datasets = read_metadata(self.folder).get("datasets", {})
        rows = [
            [role, one.get("name"), one.get("root"), one.get("split") or one.get("splits"), one.get("samples")]
            for role, one in datasets.items()
        ]
        header = ["role", "data set", "root", "split", "images"]
        table = [Table(header, rows, "Data sets, as the run found them.", [4])] if rows else []
        return [*self._bad_images(), *table]

    def _bad_images(self) -> list[Block]:
        counts = {stage: self.history.series(SKIPPED, stage).y for stage in self.history.stages()}
        told = ", ".join(f"{counts[stage][-1]:.0f} in {stage}" for stage in counts if counts[stage])
        text = f"Images that could not be read, and were replaced by others: {told}. {LOG_FILE} names them."
        return [Note(text, problem=True)] if told else []

    def losses(self) -> list[Block]:
        """Both levels over the whole run."""
        figure = draw_losses(self.history, self.axis)
        if figure is None:
            return [Note("No loss has been written yet.")]
        caption = "Loss of the pretext level (above) and of the downstream level (below); stages shaded."
        return [self.chart(figure, "losses", caption)]

    def evaluations(self) -> list[Block]:
        """What was measured on the way while fine-tuning."""
        names = self.history.names("val/", "test/")[:MOST_FIGURES]
        blocks: list[Block] = []
        for stage in self.history.stages():
            curves = self._curves(names, stage)
            if curves:
                figure = draw_curves(curves, f"steps of {stage}", "figure (fraction)")
                blocks.append(self.chart(figure, f"eval-{stage}", f"Evaluations on the way, {stage}."))
        return blocks or [Note("Nothing was evaluated on the way (finetune.eval_period is null, or was not reached).")]

    def _curves(self, names: Sequence[str], stage: str, upper: bool = False) -> Curves:
        found = {name: self.history.series(name, stage, upper) for name in names}
        return {name: series for name, series in found.items() if series.x}

    def hypergradient(self) -> list[Block]:
        """How well the systems were solved, at what cost, and what came of it."""
        stage, x_label = "bissl", "upper steps"
        if stage not in self.history.stages():
            return [Note("There are no records of a stage bissl.")]
        tolerance = OmegaConf.select(self.cfg, "solver.tolerance")
        residual: dict[str, Any] = {"log": True, "level": tolerance if type(tolerance) is float else None}
        norms = "Norms: of the right-hand side v, of the solution x, and of the plain gradient."
        charts: list[tuple[str, list[str], str, str, dict[str, Any]]] = [
            ("residual", ["solver/residual"], "relative residual", "Residual of the solve.", residual),
            ("products", ["solver/products"], "products", "Products with the Hessian per upper step.", {}),
            ("cosine", ["solver/cosine"], "cosine", "Cosine between the curvature term and the plain gradient.", {}),
            ("norms", ["solver/v_norm", "solver/x_norm", "solver/plain_norm"], "norm", norms, {"log": True}),
        ]
        blocks: list[Block] = []
        for name, keys, y_label, caption, options in charts:
            curves = self._curves(keys, stage, upper=True)
            if curves:
                blocks.append(self.chart(draw_curves(curves, x_label, y_label, **options), name, caption))
        statuses: dict[str, int] = {}
        for entry in self.history.of([stage], upper=True):
            status = str(entry.figures.get("solver/status", "not told"))
            statuses[status] = statuses.get(status, 0) + 1
        rows = list(statuses.items())
        return blocks + ([Table(["status", "upper steps"], rows, "How the solves ended.", [1])] if rows else [])

    def probes(self) -> list[Block]:
        """What the embedding was worth, and whether it collapsed, over time."""
        blocks: list[Block] = []
        for stage in self.history.stages():
            x_label = "alternations of bissl" if stage == "bissl" else f"steps of {stage}"
            for name, keys, y_label, caption in (
                ("accuracy", ["probe/knn_top1", "probe/linear_top1"], "top-1 (fraction)", "kNN and linear accuracy"),
                ("rank", ["probe/effective_rank"], "effective rank", "Effective rank of the embedding"),
            ):
                curves: dict[str, Series] = dict(self._curves(keys, stage))
                if curves:
                    figure = draw_curves(curves, x_label, y_label)
                    blocks.append(self.chart(figure, f"{name}-{stage}", f"{caption}, {stage}."))
        return blocks or [Note("Features were not probed on the way (train.probe.period is 0).")]

    def tests(self) -> list[Block]:
        """The last evaluation by class."""
        details, note = read_details(self.folder), []
        if not details:
            details, missing = self._measured()
            note = [Note(missing)]
        return [*note, *(detail_blocks(details, self.prefix) if details else [])]

    def _measured(self) -> tuple[dict[str, Details], str]:
        """The figures by class of a run that kept none, and a sentence on that."""
        none = f"The run kept no figures by class ({DETAILS_FILE})"
        if not self.images:
            return {}, f"{none}. {FILES_ONLY}"
        try:
            start = list(self.state.results)[-1] if self.state.results else "finetune"
            measured = "those of its last fine-tuning were measured for this report."
            return {start: self.pictures.details()}, f"{none}; {measured}"
        except CheckpointError as error:
            return {}, f"{none}, and they cannot be measured. {reason_of(error)}"

    def timing(self) -> list[Block]:
        """Where the time went."""
        timing = time_of(self.history, self.state.metadata, read_text(self.folder / LOG_FILE), self._tested())
        notes: list[Block] = [Note(note) for note in timing.notes]
        if not timing.stages:
            return [Note("No record with a time has been written yet.")]
        parts = {"evaluating": "evaluating", "waiting for data": "waiting", "checkpoints": "saving"}
        told = {part: any(getattr(one, part) for one in timing.stages) for part in parts.values()}
        rows = [
            [one.name, in_time(one.seconds)]
            + [in_time(getattr(one, part)) if told[part] else None for part in parts.values()]
            + [one.speed if one.speed > 0 else None]
            for one in timing.stages
        ]
        header = ["stage", "time", *parts, "images/s, last"]
        chart = self.chart(draw_timing(timing), "time", "Where the time went, by stage.")
        return [chart, Table(header, rows, "", range(1, 6), wide=True), *notes]

    def _tested(self) -> dict[str, float]:
        """Seconds of every evaluation on the test set that the results are of, by start; 0 where none were recorded."""
        try:
            details = read_details(self.folder)
        except CheckpointError:  # the chapter on the test set tells why
            details = {}
        return {start: details.get(start, Details()).seconds for start in self.state.results}

    def environment(self) -> list[Block]:
        """Versions and hardware."""
        text = read_text(self.folder / "environment.txt")
        rows = [line.partition(": ")[::2] for line in text.splitlines() if ": " in line]
        return [Table(["", ""], rows, "Environment.")] if rows else [Note("There is no environment.txt.")]

    def entry(self) -> list[Block]:
        """What was published."""
        if not self.state.entry:
            return [Note("The run has published nothing to a zoo.")]
        rows = [[key, value] for key, value in self.state.entry.items()]
        return [Table(["", ""], rows, "Zoo entry.")]
