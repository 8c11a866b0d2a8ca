"""A fine-tuned model as an artefact: saved as data, loaded without the run, its config or the data set, and run."""

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from bissl_zoo.backbones import Backbone, evaluating, share
from bissl_zoo.config.arguments import arguments_of
from bissl_zoo.data.datasets.catalog import load_image
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.samples import to_device
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.downstream.export import export_model
from bissl_zoo.errors import BisslZooError, DatasetError, RegistryError, ZooError
from bissl_zoo.files import follow, read_json, replacing_folder, sha256_of, write_atomically
from bissl_zoo.registry import BACKBONES, DOWNSTREAM_TASKS, build_backbone, build_task
from bissl_zoo.weights.export import Exported
from bissl_zoo.weights.files import model_args_problem, save_tensors, state_difference
from bissl_zoo.zoo import Entry, as_zoo
from bissl_zoo.zoo.hub import ZooLike
from bissl_zoo.zoo.index import ZOO_PREFIX

logger = logging.getLogger(__name__)

MODEL_FOLDER, MODEL_FORMAT = "model", 1
JSON_FILE, WEIGHTS_FILE, SUMS_FILE = "model.json", "model.safetensors", "SHA256SUMS"
#: names of the two files in a zoo entry, whose index has their digests
ENTRY_JSON, ENTRY_WEIGHTS = "task_model.json", "task_model.safetensors"
#: characters of the file of digests
_MAX_SUMS = 1 << 16
#: threads that decode images
_READERS = 4


class Model:
    """A backbone and a task head with class names and preprocessing.

    Args:
        metadata: the content of `model.json`, see :func:`describe_model`.

    Attributes:
        classes: class names in the order of the labels.
        metrics: test metrics of this model, by name.
    """

    def __init__(self, backbone: Backbone, task: DownstreamTask, metadata: Mapping[str, Any]) -> None:
        self.backbone, self.task, self.metadata = backbone, task, dict(metadata)
        self.classes: list[str] = list(task.classes)
        self.metrics: dict[str, float] = dict(metadata["metrics"])

    def __repr__(self) -> str:
        task, backbone = self.metadata["task"]["name"], self.metadata["backbone"]["name"]
        return f"Model({task} on {backbone}, {len(self.classes)} classes)"

    @property
    def device(self) -> torch.device:
        """The device that it runs on."""
        return next(self.task.parameters()).device

    def to(self, device: str | torch.device) -> "Model":
        """Move the model to a device and return it."""
        self.backbone.to(device)
        self.task.to(device)
        return self

    def predict(
        self, images: Any, *, threshold: float = 0.5, batch_size: int = 16, bf16: bool = False
    ) -> dict[str, Any] | list[dict[str, Any] | None]:
        """Predict one image, several, or all images below a folder.

        Images are turned upright by their EXIF orientation first. Classification gives `label`, `score` and
        `probabilities` by class name; multi-label classification `labels`, `scores` and `probabilities`; detection
        `boxes` (x0, y0, x1, y1 in pixels of the upright image), `labels` and `scores`, best first. A result of a file
        has its path as `image`.

        Args:
            images: a path, PIL image, array `(H, W[, 3])` uint8, or tensor `(3, H, W)`, uint8 or floats in [0, 1]; a
                list of these; or a folder.
            threshold: minimum score of boxes and of the labels of a multi-label image.
            batch_size: images per forward pass.
            bf16: run in bfloat16 autocast, which GPUs compute faster.
        Returns:
            A dictionary for one image. For several, a list with None for each image that cannot be read; for a folder
            these are left out. Both are logged.
        Raises:
            DatasetError: a single image cannot be read, a folder has no images, or `images` is of another type.
        """
        is_folder = _is_folder(images)
        single = not is_folder and not isinstance(images, list | tuple)
        results = []
        for source, _, prediction in self.stream(images, batch_size, bf16, skip=not single):
            described = None if prediction is None else self.task.describe(prediction, threshold)
            if described is not None and isinstance(source, str | os.PathLike):
                described = {"image": os.fspath(source), **described}
            if described is not None or not is_folder:
                results.append(described)
        return results[0] if single else results

    def stream(
        self, images: Any, batch_size: int = 16, bf16: bool = False, skip: bool = True
    ) -> Iterator[tuple[Any, Image.Image | None, Any]]:
        """Yield source, upright RGB image and raw prediction of each image of :meth:`predict`, in order.

        While a batch is computed, the next one is decoded. Folders show a progress bar.

        Args:
            skip: log images that cannot be read and yield None for image and prediction; False raises.
        """
        sources = _sources(images)
        chunks = [sources[start : start + batch_size] for start in range(0, len(sources), batch_size)]
        bar = tqdm(total=len(sources), desc="predict", unit="image", mininterval=1.0, disable=len(chunks) < 2)
        with bar, ThreadPoolExecutor(_READERS) as readers, evaluating(self.backbone, self.task):
            following = [readers.submit(_opened, source, skip) for source in chunks[0]] if chunks else []
            for number, chunk in enumerate(chunks, start=1):
                opened = [future.result() for future in following]
                following = [readers.submit(_opened, source, skip) for source in sum(chunks[number : number + 1], [])]
                predictions = iter(self._predict_batch([image for image in opened if image is not None], bf16))
                for source, image in zip(chunk, opened, strict=True):
                    yield source, image, None if image is None else next(predictions)
                bar.update(len(chunk))

    def draw(self, image: Any, threshold: float = 0.5) -> Image.Image:
        """Return the image with its prediction drawn by the task, such as boxes with class names and scores."""
        [(_, opened, prediction)] = self.stream([image], skip=False)
        return self.draw_prediction(opened, prediction, threshold)

    def draw_prediction(self, image: Image.Image, prediction: Any, threshold: float = 0.5) -> Image.Image:
        """Return an image with a raw prediction of :meth:`stream` drawn on it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        width, height = 6.0, 6.0 * image.height / image.width
        figure = Figure(figsize=(width, height + 0.6), dpi=max(100, image.width / width))
        axes = figure.add_axes((0, 0, 1, height / (height + 0.6)))
        self.task.draw(axes, image, prediction, predicted=True, threshold=threshold)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def export(
        self, output: str | os.PathLike[str], to: str | None = None, image_size: Sequence[int] | None = None
    ) -> Exported:
        """Write the model for another library, which then runs it without this package.

        "onnx" and "export" take RGB images (B, 3, H, W) in [0, 1]; classifiers give `probabilities` for any B, and
        detectors `boxes`, `scores` and `labels` of one image after suppression. "timm" writes a folder of a classifier
        for `local-dir:`, "torchvision" the state of a ResNet with classifier or of a FasterRCNN on one, "detectron2" of
        the latter for GeneralizedRCNN, whose anchors are not rounded.

        Args:
            to: one of these; None for that of the suffix: .onnx, .pt2 (export), .pth or .safetensors (torchvision),
                .pkl (detectron2), or none (timm).
            image_size: height and width of the images of "onnx" and "export"; None for those of the task.
        Returns:
            The path, and what its user must know.
        Raises:
            ZooError: the target cannot represent this model, or the file cannot be written.
        """
        return export_model(self.backbone, self.task, self.metadata, Path(output), to, image_size)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model to a folder, which is replaced as a whole: data only, with the sha256 of each file.

        Raises:
            OSError: the folder cannot be written.
            ZooError: the weights cannot be written.
        """
        folder = Path(folder)
        with replacing_folder(folder) as temporary:
            save_tensors(self.state_dict(), temporary / WEIGHTS_FILE)
            write_atomically(temporary / JSON_FILE, json.dumps(self.metadata, indent=2, ensure_ascii=False) + "\n")
            sums = [f"{sha256_of(temporary / file)}  {file}\n" for file in (JSON_FILE, WEIGHTS_FILE)]
            write_atomically(temporary / SUMS_FILE, "".join(sums))
        return folder

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights, named `backbone.*` and `task.*`."""
        parts = {"backbone": self.backbone.state_dict(), "task": self.task.state_dict()}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    @torch.no_grad()
    def _predict_batch(self, images: Sequence[Image.Image], bf16: bool) -> Any:
        if not images:
            return []
        with torch.random.fork_rng(devices=[]):
            transform = self.task.transform(train=False)
            samples = [transform(image, self.task.blank_target(image.size)) for image in images]
        batch, _ = self.task.collate(samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            predictions = self.task.predict(self.backbone, to_device(batch, self.device))
        return to_device(predictions, torch.device("cpu"))


def describe_model(
    task: DownstreamTask,
    *,
    backbone_name: str,
    backbone_arguments: Mapping[str, Any],
    shared_stage: str | None,
    task_name: str,
    task_arguments: Mapping[str, Any],
    metrics: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """Return the content of `model.json`: all that rebuilds the model, and its metrics; a warning if that is too much.

    Args:
        shared_stage: last stage of the backbone that the model uses; None for the whole backbone.
        more: further plain values, such as `start`, `licence`, `parents` and `imports` of the run.
    """
    from bissl_zoo import __version__

    # with the defaults of today, since those of a later version may differ
    parameters = inspect.signature(DOWNSTREAM_TASKS.get(task_name)).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty and p.default is not None}
    metadata = {
        "format": MODEL_FORMAT,
        "backbone": {"name": backbone_name, "arguments": dict(backbone_arguments), "shared_stage": shared_stage},
        "task": {"name": task_name, "arguments": {**defaults, **task_arguments}},
        "classes": list(task.classes),
        "preprocessing": task.preprocessing(),
        "metrics": {name: value for name, value in metrics.items() if "/" not in name},
        **more,
        "versions": {"bissl_zoo": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    metadata = json.loads(json.dumps(metadata))  # tuples are lists, as after loading
    if problem := _problem_of(metadata):
        logger.warning(f"the model of this run can be saved but not loaded again: {problem}")
    return metadata


def load_model(
    source: str | os.PathLike[str], *, zoo: ZooLike = None, device: str | torch.device | None = None
) -> Model:
    """Load a fine-tuned model in eval mode; all its files are verified by their sha256, and no code is run.

    Args:
        source: a run directory, a folder of :meth:`Model.save`, `zoo:NAME`, or the folder of a zoo entry.
        zoo: where `zoo:NAME` is looked up; None for `default_zoo()`.
        device: None for a GPU if there is one.
    Raises:
        ZooError: there is no model, it is damaged, or it needs a part that is not registered here.
    """
    text, path = os.fspath(source), Path(source)
    folder = path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path
    if text.startswith(ZOO_PREFIX):
        metadata, state, where = _read_entry(as_zoo(zoo).find(text.removeprefix(ZOO_PREFIX)))
    elif (folder / JSON_FILE).is_file():
        metadata, state, where = *_read_folder(folder), str(folder)
    elif (path / "entry.json").is_file():
        metadata, state, where = _read_entry(as_zoo(path.absolute().parent).find(path.absolute().name))
    else:
        advice = f"Give a run directory, a folder of Model.save, or {ZOO_PREFIX}NAME."
        if (path / "config.yaml").is_file():
            advice = "Its run has not fine-tuned to the end, or is of an earlier version: continue it with --resume."
        raise ZooError(f"There is no fine-tuned model in {source} (no {JSON_FILE}). {advice}")
    try:
        model = _build(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ZooError(f"{where} is not a model of this package ({type(error).__name__}: {error}).") from error
    except BisslZooError as error:
        raise ZooError(f"The model in {where} cannot be built: {error}") from error
    if difference := state_difference(model.state_dict(), state):
        raise ZooError(f"The weights in {where} do not fit its {model}: {difference}.")
    for part in ("backbone", "task"):
        part_state = {name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        getattr(model, part).load_state_dict(part_state)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _read_entry(entry: Entry) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    where = f"zoo entry '{entry.name}'"
    if ENTRY_JSON not in entry.record["files"]:
        raise ZooError(
            f"{where} holds a backbone but no fine-tuned model: its run did not set train.publish.model=True. "
            "Load the backbone with create_backbone."
        )
    return entry.read_json(ENTRY_JSON), entry.weights(ENTRY_WEIGHTS), where


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = folder / SUMS_FILE
    try:
        with open(path, encoding="utf-8", opener=follow) as file:
            lines = file.read(_MAX_SUMS).splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for path in (folder / WEIGHTS_FILE, folder / JSON_FILE):
            if sums.get(path.name) != sha256_of(path):
                raise ZooError(f"{path} is damaged: {SUMS_FILE} has another sha256. Restore it from a copy.")
        metadata, path = read_json(path), folder / WEIGHTS_FILE
        return metadata, load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ZooError(f"{path} cannot be read: {error}. Restore it from a copy.") from error


def _build(metadata: Mapping[str, Any]) -> Model:
    if metadata.get("format") != MODEL_FORMAT:
        raise ZooError(f"it has format {metadata.get('format')!r:.50}; this version reads {MODEL_FORMAT}.")
    if problem := _problem_of(metadata):
        raise ZooError(problem)
    if not all(isinstance(name, str) for name in metadata["classes"]):
        raise TypeError("class names that are not text")
    backbone, task, classes = metadata["backbone"], metadata["task"], metadata["classes"]
    for registry, name in ((BACKBONES, backbone["name"]), (DOWNSTREAM_TASKS, task["name"])):
        if name not in registry:
            files = ", ".join(map(str, metadata.get("imports") or [])) or "unknown"
            raise RegistryError(
                f"the {registry.kind} '{name}' is not registered. Import the file that registers it before load_model "
                f"(train.imports of the run: {files})."
            )
    with torch.random.fork_rng(devices=[]):
        whole = build_backbone(name=backbone["name"], **backbone["arguments"])
        trunk, _ = share(whole, backbone["shared_stage"], backbone["arguments"].get("out_features") or ())
        head = build_task(name=task["name"], backbone=trunk, classes=classes, **task["arguments"])
    return Model(trunk.eval(), head.eval(), metadata)


def _problem_of(metadata: Mapping[str, Any]) -> str:
    """Return the argument that a saved model may not set, or an empty string: those of configs of zoo entries may."""
    arguments = {k: v for k, v in metadata["backbone"]["arguments"].items() if k != "out_features"}
    if problem := model_args_problem(arguments):
        return f"backbone: {problem}"
    name = metadata["task"]["name"]
    if name not in DOWNSTREAM_TASKS:
        return ""  # it cannot be built either
    domains = arguments_of({"_target_": "bissl_zoo.registry.build_task", "name": name})
    for key, value in metadata["task"]["arguments"].items():
        if key not in domains:
            return (
                f"task.{key} is not an argument that a saved model may set. Declare it where the task is registered: "
                f'@DOWNSTREAM_TASKS.register("{name}", args={{"{key}": ...}}).'
            )
        if problem := domains[key].problem(value):
            return f"task.{key} is {value!r:.100}; it {problem}"
    return ""


def _is_folder(images: Any) -> bool:
    return isinstance(images, str | os.PathLike) and os.path.isdir(images)


def _sources(images: Any) -> list[Any]:
    if _is_folder(images):
        folder = ImageFolder(os.path.abspath(images), labelled=False)
        return [folder.source(index) for index in range(len(folder))]
    return list(images) if isinstance(images, list | tuple) else [images]


def _opened(source: Any, skip: bool) -> Image.Image | None:
    """Return an upright RGB image; None if it cannot be read and `skip` is True, with a warning."""
    try:
        return _image(source)
    except DatasetError as error:
        if not skip:
            raise
        logger.warning(f"{error} It is skipped.")
        return None


def _image(source: Any) -> Image.Image:
    if isinstance(source, str | os.PathLike):
        return load_image(source)
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    array = np.asarray(source.detach().cpu() if isinstance(source, torch.Tensor) else source)
    if isinstance(source, torch.Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if np.issubdtype(array.dtype, np.floating) and array.size and array.min() >= 0 and array.max() <= 1:
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise DatasetError(
            f"predict takes paths, PIL images, arrays (H, W, 3) and tensors (3, H, W), uint8 or floats in [0, 1], not "
            f"{type(source).__name__} of shape {array.shape} and type {array.dtype}."
        )
    return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array).convert("RGB")
