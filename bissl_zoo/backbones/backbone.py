"""Any timm model as feature maps by stage, and its split into a trunk (shared by both levels) and a tail."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bissl_zoo.errors import BisslZooError, RegistryError, did_you_mean
from bissl_zoo.registry import BACKBONES


class SplitError(BisslZooError):
    """A backbone that cannot be split at the stage asked for, and why."""


class FeatureInfo(NamedTuple):
    """What a stage yields: maps of `channels` at 1/`stride` of the image; `module` is timm's name of the layer."""

    channels: int
    stride: int
    module: str


class Backbone(nn.Module):
    """A timm model that returns the feature maps of the stages it was asked for.

    Stages of a pyramid are named by their stride, `c2` (1/4) to `c5` (1/32); stages that share a stride, as in a plain
    ViT, by timm's module names (`blocks.11`). The state dict has timm's own names, so files are exchanged with timm.

    Args:
        model: a timm model with `forward_intermediates`, built with `num_classes=0`.
        name: its timm architecture name.
        out_features: stages that `forward` returns; the last one where none are given.
        model_args: the arguments it was built with beyond timm's defaults; published with its weights.
    """

    def __init__(
        self, model: nn.Module, name: str, out_features: Sequence[str] = (), model_args: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise RegistryError(f"timm's '{name}' has no forward_intermediates, so it gives no feature maps by stage.")
        self.model = model
        self.name = name
        self.model_args = dict(model_args or {})
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
        """Raise `SplitError` naming the stages there are, where `stage` is none of them."""
        if stage not in self.feature_info:
            hint = did_you_mean(stage, self.stages)
            raise SplitError(f"Backbone '{self.name}' has no stage '{stage}'.{hint} Stages: {', '.join(self.stages)}.")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images `(B, 3, H, W)` to `{stage: (B, C, H/stride, W/stride)}`."""
        indices = sorted(self.stages.index(stage) for stage in self.out_features)
        maps = self.model.forward_intermediates(images, indices=indices, stop_early=True, intermediates_only=True)
        return {self.stages[index]: features for index, features in zip(indices, maps, strict=True)}

    def split(self, stage: str, out_features: Sequence[str] = ()) -> tuple["Backbone", "Tail"]:
        """Cut the model after `stage` into a trunk that returns that stage's map and a tail that takes it.

        `tail(trunk(images)[stage])` is what the whole model computes (checked here on a probe, bit for bit), and every
        parameter is in exactly one of the two, under the name it has in the whole. Both are copies.

        Args:
            out_features: earlier stages whose maps the trunk is to return as well.
        Raises:
            SplitError: there is no such stage, what follows it needs more than its map (class tokens, skips), or a map
                is asked for that lies beyond it.
        """
        kept = self._stages_up_to(stage, out_features)
        if isinstance(self.model, VisionTransformer) and self.model.num_prefix_tokens:
            raise SplitError(
                f"Backbone '{self.name}' cannot be split into trunk and tail: its class or register tokens are not "
                "part of the feature map. Build it without them: class_token=False, reg_tokens=0, global_pool='avg'."
            )
        trunk_model = copy.deepcopy(self.model)
        trunk_model.prune_intermediate_layers([self.stages.index(stage)], prune_norm=True, prune_head=True)
        maps = [name for name in kept if name == stage or name in out_features]
        trunk = Backbone(trunk_model, self.name, maps, self.model_args)
        trunk.feature_info = {name: self.feature_info[name] for name in kept}
        tail = Tail(self.model, self.feature_info[stage].module, self._probe())
        self._check_split(stage, trunk, tail)
        return trunk, tail

    def freeze(self, stage: str) -> None:
        """Train no more what runs up to `stage`: no gradients, and batch norm by its running statistics.

        Raises:
            SplitError: there is no such stage.
        """
        self.check_stage(stage)
        finished, _ = _run_to_stage(self.model, self.feature_info[stage].module, self._probe())
        frozen = [module for name, module in self.model.named_modules() if name in finished]
        for module in frozen:
            module.requires_grad_(False).eval()
        for parameter in self.model.parameters(recurse=False):  # embeddings of positions, which the first layers take
            parameter.requires_grad_(False)

    def _stages_up_to(self, stage: str, wanted: Sequence[str]) -> list[str]:
        for name in (stage, *wanted):
            self.check_stage(name)
        kept = self.stages[: self.stages.index(stage) + 1]
        beyond = [name for name in wanted if name not in kept]
        if beyond:
            raise SplitError(
                f"Backbone '{self.name}' is split after '{stage}', so that its trunk has no map '{beyond[0]}'. Leave "
                f"that out of backbone.out_features, or set bilevel.shared_stage={beyond[-1]}."
            )
        return kept

    def _check_split(self, stage: str, trunk: "Backbone", tail: "Tail") -> None:
        whole = set(self.state_dict())
        parts = [*trunk.state_dict(), *tail.state_dict()]
        try:
            with torch.no_grad(), evaluating(self, trunk, tail):
                same = torch.equal(tail(trunk(self._probe())[stage]), self.model(self._probe()))
            problem = None if same else "the two parts do not compute what the whole does"
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            problem = f"the part after it does not take the feature map alone ({error})"
        if problem is None and (len(parts) != len(set(parts)) or set(parts) != whole):
            problem = f"parameters are lost or doubled ({', '.join(sorted(whole ^ set(parts))[:3])} ...)"
        if problem:
            raise SplitError(f"Backbone '{self.name}' cannot be split at '{stage}': {problem}. Try another stage.")

    def _probe(self) -> Tensor:
        cfg = self.model.pretrained_cfg
        size = self.model_args.get("img_size") or (cfg["input_size"][1:] if cfg.get("fixed_input_size") else 64)
        height, width = (size, size) if isinstance(size, int) else size
        parameter = next(self.model.parameters())
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, 3, height, width, generator=generator)
        return image.to(parameter)


class Tail(nn.Module):
    """What follows a stage: feature map `(B, C, h, w)` -> embedding `(B, num_features)`, pooled.

    It is the timm model with everything that ran up to the stage replaced by the identity, and so keeps timm's names.
    """

    def __init__(self, model: nn.Module, stage_module: str, probe: Tensor) -> None:
        super().__init__()
        finished, output = _run_to_stage(model, stage_module, probe)
        self.model = copy.deepcopy(model)
        _drop_finished(self.model, "", finished, stage_module)
        if isinstance(self.model, VisionTransformer):
            self.model.patch_embed = _MapToTokens()
            self.model.pos_embed = None
            if output.stride(-1) != 1:  # in another memory layout, pooling would add up in another order
                self.model.norm_pre = _ChannelMajor()
        self.num_features: int = self.model.head_hidden_size
        self.register_state_dict_post_hook(_strip_model_prefix)
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    def forward(self, features: Tensor) -> Tensor:
        """Embed a stage's feature map as the whole model would."""
        return self.model(features)


class _MapToTokens(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)


class _ChannelMajor(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)


@BACKBONES.register("timm")
def timm_backbone(architecture: str, out_features: Sequence[str] = (), **model_args: Any) -> Backbone:
    """A backbone of any timm architecture, with random weights and no classifier.

    Every name of `timm.list_models()` is registered as well: `build_backbone(name="resnet50")` is the usual spelling.
    `model_args` go to `timm.create_model` (`drop_path_rate`, `img_size`, ...).
    """
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
    """The whole model's state dict from the two parts that `Backbone.split` made."""
    return {**trunk, **tail}


def _named_stages(model: nn.Module) -> dict[str, FeatureInfo]:
    stages = [FeatureInfo(info["num_chs"], info["reduction"], info["module"]) for info in model.feature_info]
    strides = [stage.stride for stage in stages]
    if strides == sorted(set(strides)):
        return {f"c{stage.stride.bit_length() - 1}": stage for stage in stages}
    return {stage.module: stage for stage in stages}


@contextlib.contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Eval mode for a probe, which must not move batch-norm statistics; afterwards each module's own mode again."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run_to_stage(model: nn.Module, stage_module: str, probe: Tensor) -> tuple[set[str], Any]:
    """Names of the modules that have returned by the time `stage_module` has, on `probe`, and what that returned."""
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
