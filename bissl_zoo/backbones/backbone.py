"""timm models as feature maps by stage, and their division into a trunk (shared by both levels) and a tail."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bissl_zoo.errors import BisslZooError, ConfigError, RegistryError, did_you_mean
from bissl_zoo.registry import BACKBONES

#: the output of a trunk beside its maps, if it contains the whole backbone: embeddings (B, num_features)
POOLED = "pooled"


class SplitError(BisslZooError):
    """A backbone that cannot be split at a stage."""


class FeatureInfo(NamedTuple):
    """Feature maps of a stage: `channels` at 1/`stride` of the image size; `module` is timm's name of the layer."""

    channels: int
    stride: int
    module: str


class Backbone(nn.Module):
    """A timm model that returns the feature maps of selected stages.

    Stages of a pyramid are named by their stride, `c2` (1/4) to `c5` (1/32). Stages with equal strides, as in a plain
    ViT, have timm's module names (`blocks.11`). The state dict has timm's parameter names, so timm can load it.

    Attributes:
        num_features: width of `pooled`, which `forward` returns as well if this is the trunk of :func:`share` and holds
            the whole model; otherwise None.

    Args:
        model: a timm model with `forward_intermediates`, built with `num_classes=0`.
        name: name of its timm architecture.
        out_features: stages that `forward` returns; by default the last one.
        model_args: arguments of `timm.create_model` beyond its defaults; published with the weights.
    Raises:
        RegistryError: the model has no `forward_intermediates`.
        SplitError: `out_features` names an unknown stage.
    """

    def __init__(
        self, model: nn.Module, name: str, out_features: Sequence[str] = (), model_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise RegistryError(f"timm's '{name}' has no forward_intermediates, so it has no feature maps by stage.")
        self.model = model
        self.name = name
        self.model_args = dict(model_args or {})
        self.num_features: int | None = None
        self.feature_info = _named_stages(model)
        self.out_features = tuple(out_features) or (self.stages[-1],)
        for stage in self.out_features:
            self.check_stage(stage)
        self.register_state_dict_post_hook(_strip_model_prefix)
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    @property
    def stages(self) -> list[str]:
        """Names of all stages, shallow to deep."""
        return list(self.feature_info)

    def check_stage(self, stage: str) -> None:
        """Raise `SplitError` with the available stages if `stage` is not one of them."""
        if stage not in self.feature_info:
            hint = did_you_mean(stage, self.stages)
            raise SplitError(f"Backbone '{self.name}' has no stage '{stage}'.{hint} Stages: {', '.join(self.stages)}.")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalized images `(B, 3, H, W)` to `{stage: (B, C, H/stride, W/stride)}`, without class tokens.

        Raises:
            ConfigError: timm's model does not take images of this size.
        """
        indices = sorted(self.stages.index(stage) for stage in self.out_features)
        less = {"stop_early": True, "intermediates_only": True} if self.num_features is None else {}
        try:
            maps = self.model.forward_intermediates(images, indices=indices, **less)
        except AssertionError as error:
            size = " x ".join(map(str, images.shape[2:]))
            raise ConfigError(
                f"Backbone '{self.name}' does not take images of {size}: {error} Change the size of the images, or "
                "build it for this size (backbone.img_size), or for several sizes (backbone.dynamic_img_size=True)."
            ) from error
        pooled = {}
        if self.num_features is not None:
            last, maps = maps
            pooled = {POOLED: self.model.forward_head(last)}
        return {**{self.stages[index]: features for index, features in zip(indices, maps, strict=True)}, **pooled}

    def split(self, stage: str, out_features: Sequence[str] = ()) -> tuple["Backbone", "Tail"]:
        """Split the model after `stage` into copies: a trunk that returns that stage's map, and a tail that takes it.

        `tail(trunk(images)[stage])` equals the output of the whole model, bit for bit on a probe image. Each parameter
        is in exactly one of the two parts, under its name in the whole model.

        Args:
            stage: last stage of the trunk.
            out_features: earlier stages whose maps the trunk returns as well.
        Raises:
            SplitError: there is no such stage, the layers after it need more than its map (class tokens, skip
                connections), or `out_features` names a later stage.
        """
        stages = self._stages_up_to(stage, out_features)
        if isinstance(self.model, VisionTransformer) and self.model.num_prefix_tokens:
            raise SplitError(
                f"Backbone '{self.name}' cannot be split at '{stage}': its class or register tokens are not part of "
                "the feature map. Share the whole backbone (bilevel.shared_stage=null), or build one without them: "
                "class_token=False, reg_tokens=0, global_pool='avg'."
            )
        trunk_model = copy.deepcopy(self.model)
        trunk_model.prune_intermediate_layers([self.stages.index(stage)], prune_norm=True, prune_head=True)
        maps = [name for name in stages if name == stage or name in out_features]
        trunk = Backbone(trunk_model, self.name, maps, self.model_args)
        trunk.feature_info = {name: self.feature_info[name] for name in stages}
        try:
            tail = Tail(self.model, self.feature_info[stage].module, self._probe())
            problem = self._difference(stage, trunk, tail)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, ConfigError) as error:
            problem = f"the layers after it need more than the feature map ({error})"
        if problem:
            raise SplitError(
                f"Backbone '{self.name}' cannot be split at '{stage}': {problem}. Try another stage, or share the "
                "whole backbone (bilevel.shared_stage=null)."
            )
        return trunk, tail

    def whole_trunk(self, out_features: Sequence[str] = ()) -> "Backbone":
        """Return a copy that holds the whole model, and returns its pooled embedding beside the maps."""
        maps = [stage for stage in self.stages if stage == self.stages[-1] or stage in out_features]
        trunk = Backbone(copy.deepcopy(self.model), self.name, maps, self.model_args)
        trunk.num_features = self.model.head_hidden_size
        return trunk

    def freeze(self, stage: str) -> None:
        """Freeze all layers up to `stage`: no gradients, and batch norm with running statistics.

        Raises:
            SplitError: there is no such stage.
        """
        self.check_stage(stage)
        finished, _ = _run_to_stage(self.model, self.feature_info[stage].module, self._probe())
        frozen = [module for name, module in self.model.named_modules() if name in finished]
        for module in frozen:
            module.requires_grad_(False).eval()
        for parameter in self.model.parameters(recurse=False):  # position embeddings, inputs of the first layers
            parameter.requires_grad_(False)

    def _stages_up_to(self, stage: str, wanted: Sequence[str]) -> list[str]:
        for name in (stage, *wanted):
            self.check_stage(name)
        stages = self.stages[: self.stages.index(stage) + 1]
        beyond = [name for name in wanted if name not in stages]
        if beyond:
            raise SplitError(
                f"Backbone '{self.name}' is split after '{stage}', so its trunk has no map '{beyond[0]}'. Remove it "
                f"from backbone.out_features, or set bilevel.shared_stage={beyond[-1]}."
            )
        return stages

    def _difference(self, stage: str, trunk: "Backbone", tail: "Tail") -> str:
        """Return how trunk and tail differ from the whole; empty if they do not."""
        with torch.no_grad(), evaluating(self, trunk, tail):
            if not torch.equal(tail(trunk(self._probe())[stage]), self.model(self._probe())):
                return "the output of the two parts differs from that of the whole"
        whole, parts = set(self.state_dict()), [*trunk.state_dict(), *tail.state_dict()]
        if len(parts) != len(set(parts)) or set(parts) != whole:
            return f"parameters are missing or duplicated ({', '.join(sorted(whole ^ set(parts))[:3])} ...)"
        return ""

    def _probe(self) -> Tensor:
        cfg = self.model.pretrained_cfg
        small = 32 * math.ceil(cfg["input_size"][-1] / 112)  # 64 for a network for 224 pixels
        size = self.model_args.get("img_size") or (cfg["input_size"][1:] if cfg.get("fixed_input_size") else small)
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, self.model_args.get("in_chans", 3), height, width, generator=generator)
        return image.to(next(self.model.parameters()))


class Tail(nn.Module):
    """The layers after a stage: map a feature map `(B, C, h, w)` to a pooled embedding `(B, num_features)`.

    It is the timm model with all layers up to the stage replaced by identities, so it keeps timm's parameter names.
    """

    def __init__(self, model: nn.Module, stage_module: str, probe: Tensor) -> None:
        super().__init__()
        finished, output = _run_to_stage(model, stage_module, probe)
        self.model = copy.deepcopy(model)
        _drop_finished(self.model, "", finished, stage_module)
        if getattr(model, "output_fmt", None) == "NHWC":  # inside, as in Swin; maps are (B, C, h, w)
            self.model.set_submodule(stage_module, _ToChannelsLast())
        if isinstance(self.model, VisionTransformer):
            self.model.patch_embed = _MapToTokens()
            self.model.pos_embed = None
            if output.stride(-1) != 1:  # pooling sums in memory order: keep the layout for equal rounding
                self.model.norm_pre = _ChannelMajor()
        self.num_features: int = self.model.head_hidden_size
        self.register_state_dict_post_hook(_strip_model_prefix)
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    def forward(self, features: Tensor) -> Tensor:
        """Map the stage's feature map to the embedding that the whole model computes."""
        return self.model(features)


class Pool(nn.Module):
    """The tail of a trunk that needs none: global average pooling of a map; a pooled embedding passes through.

    Args:
        num_features: width of the embedding.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Map `(B, C, h, w)` or `(B, C)` to `(B, C)`."""
        return features.mean(dim=(2, 3)) if features.dim() == 4 else features


class _ToChannelsLast(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)


class _MapToTokens(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)


class _ChannelMajor(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)


def share(backbone: nn.Module, stage: str | None = None, out_features: Sequence[str] = ()) -> tuple[nn.Module, Any]:
    """Return copies of the part of a backbone that both levels share, and of the tail after it.

    Without a stage the whole backbone is shared. The layers after the last map stay in the tail if the map is all they
    need (pooling, a final norm or convolution), because tasks on maps do not train them; otherwise, as with class
    tokens, the trunk has them too and returns :data:`POOLED`, and the tail is a :class:`Pool`.

    A registered backbone that is not a timm model is a module with `name`, `stages`, `out_features` and `feature_info`
    as in :class:`Backbone`, whose `forward` returns a map for each of its `out_features`. It may return :data:`POOLED`
    and have its width as `num_features`. It can be shared in part if it has a method `split`.

    Args:
        stage: last stage that is shared; None for the whole backbone.
        out_features: earlier stages whose maps the trunk returns as well.
    Raises:
        SplitError: an unknown stage, or a backbone that cannot be split there.
    """
    if stage is not None and not hasattr(backbone, "split"):
        raise SplitError(f"Backbone '{backbone.name}' has no method split. Share all of it: bilevel.shared_stage=null.")
    if stage is not None:
        return backbone.split(stage, out_features)
    if isinstance(backbone, Backbone):
        for name in out_features:
            backbone.check_stage(name)
        try:
            return backbone.split(backbone.stages[-1], out_features)
        except SplitError:
            trunk: nn.Module = backbone.whole_trunk(out_features)
    else:
        trunk = copy.deepcopy(backbone)
    return trunk, Pool(pooled_width(trunk))


def pooled_width(trunk: nn.Module) -> int:
    """Return the width of `pooled_features`."""
    return getattr(trunk, "num_features", None) or trunk.feature_info[trunk.out_features[-1]].channels


def tail_input(features: dict[str, Tensor], stage: str) -> Tensor:
    """Return the input of the tail: the output :data:`POOLED` of a trunk, or else its map of `stage`."""
    return features[POOLED] if POOLED in features else features[stage]


@BACKBONES.register("timm")
def timm_backbone(architecture: str, out_features: Sequence[str] = (), **model_args: Any) -> Backbone:
    """Build a backbone of any timm architecture, with random weights and no classifier.

    All names of `timm.list_models()` are registered, too: `build_backbone(name="resnet50")` is the usual form.

    Args:
        architecture: name in `timm.list_models()`.
        out_features: see :class:`Backbone`.
        model_args: arguments of `timm.create_model`, such as `drop_path_rate` or `img_size`.
    Raises:
        RegistryError: an unknown architecture, or arguments that it does not take, such as `pretrained`.
    """
    if model_args.pop("pretrained", False) or {"pretrained_cfg", "checkpoint_path"} & model_args.keys():
        raise RegistryError(
            f"backbone.pretrained: the config names initial weights elsewhere. Set train.init=timm:{architecture} (or "
            f'timm:{architecture}.TAG), or in Python create_backbone("{architecture}", pretrained=True).'
        )
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise RegistryError(f"timm has no architecture '{architecture}'.{hint}")
    try:
        model = timm.create_model(architecture, num_classes=0, **model_args)
    except TypeError as error:
        raise RegistryError(f"timm's '{architecture}' does not take these arguments: {error}.") from error
    return Backbone(model, architecture, out_features, model_args)


for _architecture in timm.list_models():
    BACKBONES.register(_architecture)(partial(timm_backbone, _architecture))


def merge_split_states(trunk: dict[str, Tensor], tail: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the state dicts of the two parts of `Backbone.split` to that of the whole model."""
    return {**trunk, **tail}


def _named_stages(model: nn.Module) -> dict[str, FeatureInfo]:
    stages = [FeatureInfo(info["num_chs"], info["reduction"], info["module"]) for info in model.feature_info]
    strides = [stage.stride for stage in stages]
    if strides == sorted(set(strides)):
        return {f"c{stage.stride.bit_length() - 1}": stage for stage in stages}
    return {stage.module: stage for stage in stages}


@contextlib.contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Context in which modules are in eval mode; afterwards each module's mode is restored."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run_to_stage(model: nn.Module, stage_module: str, probe: Tensor) -> tuple[set[str], Any]:
    """Return the names of the modules that finish up to and including `stage_module`, and the output of the latter."""
    finished: set[str] = set()
    output = None

    def note(name: str, module: nn.Module, inputs: Any, returned: Any) -> None:
        nonlocal output
        if output is None:
            finished.add(name)
            output = returned if name == stage_module else None

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), evaluating(model):
            model(probe)
    finally:
        for handle in handles:
            handle.remove()
    return finished, output


def _drop_finished(module: nn.Module, prefix: str, finished: set[str], stage_module: str) -> None:
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if path in finished:
            setattr(module, name, nn.Identity())
        elif stage_module.startswith(f"{path}."):
            _drop_finished(child, f"{path}.", finished, stage_module)


def _strip_model_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        state[prefix + key[len(prefix) + len("model.") :]] = state.pop(key)


def _add_model_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}model.{key[len(prefix) :]}"] = state.pop(key)
