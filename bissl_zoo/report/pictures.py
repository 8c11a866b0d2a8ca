"""The parts of a report that need a run's data sets or its model: samples, views, predictions, t-SNE.

What they need is opened when it is first asked for, and once; what cannot be had is told by each part that wants it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from omegaconf import DictConfig

from bissl_zoo.backbones import Backbone
from bissl_zoo.distributed import get_world_size
from bissl_zoo.downstream import DownstreamTask, Evaluator
from bissl_zoo.engine.build import Context, build_datasets, build_downstream
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.evaluate import Details, details_of, evaluate
from bissl_zoo.engine.features import sample_indices
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.report.images.data import draw_samples, samples_of
from bissl_zoo.report.images.embeddings import draw_embeddings
from bissl_zoo.report.images.predictions import Prediction, draw_predictions, predict
from bissl_zoo.report.images.visualize import NEIGHBOURS, picture_embeddings, picture_views
from bissl_zoo.report.page import Block, Note, Picture
from bissl_zoo.report.svg import to_png, to_svg
from bissl_zoo.runs.directory import CONFIG_FILE

#: images that are shown of the data, of its views, and of the best and the worst predictions
SAMPLES, VIEWED, PREDICTED = 8, 3, 4
#: images on one sheet, which is as wide as a phone at a size that can be read
SHEET = 4
#: inches up to which that holds
_PHONE = 5.0
NO_MODEL = "The run has no stage finetune, so there is no fine-tuned model."
#: images on a map of features
MAPPED = 500
#: images of a test set up to which one that kept no figures by class is measured anew
_MEASURED_ANEW = 2000


@dataclass(frozen=True)
class Model:
    """A fine-tuned model and what it is asked about."""

    context: Context
    backbone: Backbone
    task: DownstreamTask


class RunPictures:
    """Pictures of the run in `folder`.

    Its config is opened as any other: what it names is imported and built. Ask for none of a run that is not trusted.

    Args:
        images: most of a set that are looked at for predictions and for a map of features.
        prefix: of the names of charts, unlike those of other runs on the page.
    """

    def __init__(self, folder: Path, images: int, prefix: str) -> None:
        self.folder, self.images, self.prefix = folder, images, prefix

    @cached_property
    def cfg(self) -> DictConfig:
        """The config, checked, with `train.imports` imported."""
        source = str(self.folder / CONFIG_FILE)
        cfg = open_config(source)
        check_config(cfg, source)
        return cfg

    @cached_property
    def model(self) -> Model:
        """The fine-tuned model that the run left."""
        _require_one_process()
        if "finetune" not in self.cfg.train.stages:
            raise CheckpointError(NO_MODEL)
        weights, _ = load_init(str(self.folder), self.cfg, evaluate=True)
        device = choose_device(self.cfg.train.device)
        context = Context(self.cfg, build_datasets(self.cfg, {"test"}), device)
        with preserved_randomness(device):
            return Model(context, *build_downstream(context, weights))

    def data(self) -> list[Block]:
        """A sheet of images per kind of data set, with their boxes or labels."""
        role = "train" if {"bissl", "finetune"} & set(self.cfg.train.stages) else "pretext"
        dataset = build_datasets(self.cfg, {role})[role]
        chosen = sample_indices(len(dataset), SAMPLES, seed=0)
        blocks: list[Block] = []
        for start in range(0, len(chosen), SHEET):
            samples = samples_of(dataset, chosen[start : start + SHEET])
            numbers = f"{start + 1} to {start + len(samples)} of {len(dataset)}"
            figure = draw_samples(samples, getattr(dataset, "classes", None), f"dataloader.{role}", columns=2)
            caption = f"Images of dataloader.{role}, drawn at random, with what is true of them: {numbers}."
            blocks.append(Picture(to_png(figure, caption), caption))
        return blocks

    def views(self) -> list[Block]:
        """What the pretext method is given."""
        _require_one_process()
        if "pretext" not in self.cfg.dataloader or not {"pretrain", "bissl"} & set(self.cfg.train.stages):
            return []
        figure = picture_views(self.cfg, VIEWED)
        name = f"Views of {self.cfg.pretext.name}"
        wide = figure.get_figwidth() > _PHONE
        return [Picture(to_png(figure, name), f"{name}: what the pretext method is given of an image.", wide)]

    def predictions(self) -> list[Block]:
        """The test images that the model is best and worst at, of those looked at."""
        if "finetune" not in self.cfg.train.stages:
            return [Note(NO_MODEL)]
        model = self.model
        dataset, loader = model.context.data["test"], self.cfg.dataloader.test
        with preserved_randomness(model.context.device):
            chosen = sample_indices(len(dataset), self.images, seed=0)
            settings = (model.context.device, loader.batch_size, loader.get("num_workers", 0))
            found = predict(model.backbone, model.task, dataset, chosen, *settings)
        found.sort(key=lambda one: one.quality)
        if len(found) < 2 * PREDICTED:
            return self._sheets(found[::-1], "best first", len(chosen))
        best, worst = found[: -PREDICTED - 1 : -1], found[:PREDICTED]
        return self._sheets(best, "best", len(chosen)) + self._sheets(worst, "worst", len(chosen))

    def _sheets(self, predictions: Sequence[Prediction], which: str, among: int) -> list[Block]:
        """Two pictures in a row: an image of boxes is drawn twice, as it is and as it was predicted."""
        each = 1 if isinstance(predictions[0].found, dict) else 2
        parts = [predictions[start : start + each] for start in range(0, len(predictions), each)]
        return [self._sheet(part, f"{which} {number}", among) for number, part in enumerate(parts, start=1)]

    def _sheet(self, predictions: Sequence[Prediction], which: str, among: int) -> Picture:
        dataset = self.model.context.data["test"]
        samples = samples_of(dataset, [one.index for one in predictions])
        figure = draw_predictions(samples, predictions, dataset.classes, which)
        whole = "the whole test set" if among == len(dataset) else f"{among} of {len(dataset)} test images"
        caption = f"Predictions, {which}, among {whole}; the model of the last fine-tuning."
        if isinstance(predictions[0].found, dict):
            caption += " AP50 ranks boxes of any score, those drawn have 0.5 or more."
        return Picture(to_png(figure, caption), caption)

    def embeddings(self) -> list[Block]:
        """Test features before and after the BiSSL stage, as maps."""
        _require_one_process()
        if "bissl" not in self.cfg.train.stages:
            return [Note("The run has no stage bissl that features could be looked at before and after.")]
        picture = picture_embeddings(self.cfg, [str(self.folder)], min(self.images, MAPPED))
        notes = [f"kNN: top-1, k = {NEIGHBOURS}, from {min(self.images, MAPPED)} training images at most"]
        blocks: list[Block] = []
        for number, one in enumerate(picture.embeddings):
            figure = draw_embeddings([one], picture.classes, "t-SNE of test features", notes)
            caption = f"{one.name}: test features by t-SNE; a point is an image, or the crop of an object."
            blocks.append(Picture(to_svg(figure, f"{self.prefix}-tsne{number}", caption, paper=True), caption))
        return blocks

    def details(self) -> Details:
        """Figures by class of the last fine-tuning, measured anew, of a run that kept none."""
        model, found = self.model, []
        count = len(model.context.data["test"])
        if count > _MEASURED_ANEW:
            raise DatasetError(
                f"The run kept no figures by class, and its test set of {count} images is too large to measure them on "
                "the way. Run it to its end again with this version."
            )

        def keep(evaluator: Evaluator) -> None:
            found.append(details_of(evaluator))

        with preserved_randomness(model.context.device), torch.no_grad():
            evaluate(model.context, model.backbone, model.task, inspect=keep)
        return found[0]


def _require_one_process() -> None:
    """Networks are built by all processes together, and a report by one of them."""
    if get_world_size() > 1:
        raise CheckpointError(
            f"This was left out as the run ended, since it had {get_world_size()} processes. "
            "python tools/report.py RUN draws it."
        )
