"""The parts of a report that need the data sets or the model of a run: samples, views, predictions, t-SNE."""

from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from bissl_zoo.distributed import get_world_size
from bissl_zoo.engine.build import Context, build_datasets, build_downstream, data_roles
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.features import sample_indices
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import CheckpointError
from bissl_zoo.registry import STAGES
from bissl_zoo.report.images.embeddings import draw_embeddings
from bissl_zoo.report.images.sheets import draw_predictions, predict, samples_of
from bissl_zoo.report.images.visualize import NEIGHBOURS, data_figure, embeddings_figure, views_figure
from bissl_zoo.report.page import Block, Chart, Note, embed
from bissl_zoo.runs.directory import CONFIG_FILE

#: images that are shown of the data, of the views, and of the best and of the worst predictions
SAMPLES, VIEWS, PREDICTIONS = 8, 3, 4
#: inches up to which a figure is readable on a phone
_PHONE = 5.0
#: images on a map of features
MAPPED = 500


class RunImages:
    """Images of the run in `folder`; its config is imported and built, so the run must be trusted.

    Args:
        images: maximum number of images of a data set for predictions and feature maps.
    """

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images

    @cached_property
    def cfg(self) -> DictConfig:
        """Return the checked config, with `train.imports` imported."""
        source = str(self.folder / CONFIG_FILE)
        cfg = open_config(source)
        check_config(cfg, source)
        return cfg

    def data(self) -> list[Block]:
        """Return sheets of random training images with their targets."""
        _require_one_process()
        role = "train" if "train" in data_roles(self.cfg) else "pretext"
        figure = data_figure(self.cfg, role, SAMPLES, columns=2)
        caption = f"Random images of dataloader.{role} with their targets."
        return [Chart(embed(figure, caption, "png"), caption)]

    def views(self) -> list[Block]:
        """Return the views that the pretext method trains on."""
        _require_one_process()
        if "pretext" not in data_roles(self.cfg):
            return []
        figure = views_figure(self.cfg, VIEWS)
        caption = f"Views of {self.cfg.pretext.name}: what the pretext method trains on."
        return [Chart(embed(figure, caption, "png"), caption, wide=figure.get_figwidth() > _PHONE)]

    def predictions(self) -> list[Block]:
        """Return the test images with the best and the worst predictions."""
        if not any(STAGES.get(name).evaluates for name in self.cfg.train.stages):
            return [Note("The run has no stage finetune, so there is no fine-tuned model.")]
        _require_one_process()
        weights, _ = load_init(str(self.folder), self.cfg, evaluate=True)
        context = Context(self.cfg, build_datasets(self.cfg, {"test"}), choose_device(self.cfg.train.device))
        dataset, loader = context.data["test"], self.cfg.dataloader.test
        with preserved_randomness(context.device):
            backbone, task = build_downstream(context, weights)
            indices = sample_indices(len(dataset), self.images, seed=0)
            settings = (context.device, loader.batch_size, loader.get("num_workers", 0))
            predictions = predict(backbone, task, dataset, indices, *settings)
        predictions.sort(key=lambda prediction: -prediction.score)
        if len(predictions) < 2 * PREDICTIONS:
            groups = {"best first": predictions}
        else:
            groups = {"best": predictions[:PREDICTIONS], "worst": predictions[: -PREDICTIONS - 1 : -1]}
        among = f"{len(indices)} of {len(dataset)} test images"
        blocks: list[Block] = []
        for which, group in groups.items():
            samples = samples_of(dataset, [prediction.index for prediction in group])
            caption = f"Predictions, {which}, among {among}; the model of the last fine-tuning."
            figure = draw_predictions(samples, group, task, which, pairs=1)
            blocks.append(Chart(embed(figure, caption, "png"), caption))
        return blocks

    def embeddings(self) -> list[Block]:
        """Return maps of the test features before and after the BiSSL stage."""
        _require_one_process()
        if not any(map(alternates, self.cfg.train.stages)):
            return [Note("The run has no bilevel stage, so there are no features before and after it.")]
        result = embeddings_figure(self.cfg, [str(self.folder)], min(self.images, MAPPED))
        notes = [f"kNN: top-1 accuracy, k = {NEIGHBOURS}"]
        blocks: list[Block] = []
        for item in result.embeddings:
            figure = draw_embeddings([item], result.classes, "t-SNE of test features", notes)
            caption = f"{item.name}: test features by t-SNE; a point is an image or the crop of an object."
            blocks.append(Chart(embed(figure, caption), caption))
        return blocks


def _require_one_process() -> None:
    """Networks are built by all processes together, but a report is made by one of them."""
    if get_world_size() > 1:
        raise CheckpointError(
            f"Left out, since the run ended with {get_world_size()} processes. bissl report RUN adds it."
        )
