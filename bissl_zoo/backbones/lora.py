"""LoRA: train low-rank additions to linear layers of a transformer; everything else is frozen."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bissl_zoo.errors import RegistryError, did_you_mean

#: parts of the rows of a layer, by their number: a plain layer, `kv` and `qkv`
_PARTS = {1: ("all",), 2: ("k", "v"), 3: ("q", "k", "v")}
_FACTOR = re.compile(r"(?:^|.*\.)lora_(?:[ab]_\w+|scale)$")


class LoRALinear(nn.Linear):
    """A linear layer with `alpha / r * B A` added to its weight, in all or some of the rows (arXiv 2106.09685).

    The state dict has timm's names, and `lora_a_NAME (r, in)`, `lora_b_NAME (rows, r)` and `lora_scale`. Loading a
    state without them sets `B` to zero. (peft adds one product to all of timm's fused `qkv`, and not to `q` and `v`.)

    Args:
        linear: the layer; its parameters are shared with this one.
        names: parts of the rows that get a product: "all", or some of "q", "k", "v".
        parts: number of parts in the layer.
        r, alpha: rank, and scale times the rank.
    """

    def __init__(self, linear: nn.Linear, names: Sequence[str], parts: int, r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._parameters.update(linear._parameters)  # not by assignment, since `weight` is a property here
        self.rows = {name: _rows(name, parts, linear.out_features) for name in names}
        for name, rows in self.rows.items():
            a, b = linear.weight.new_empty(r, self.in_features), linear.weight.new_zeros(rows.stop - rows.start, r)
            self.register_parameter(f"lora_a_{name}", nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5))))
            self.register_parameter(f"lora_b_{name}", nn.Parameter(b))
        self.register_buffer("lora_scale", torch.tensor(alpha / r))

    @property
    def weight(self) -> Tensor:
        """The merged weight, which attention reads that does not call the layer."""
        return merge_lora({**self._parameters, "lora_scale": self.lora_scale})["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        out = functional.linear(x, self._parameters["weight"], self.bias)
        for name, rows in self.rows.items():
            low = functional.linear(x, self._parameters[f"lora_a_{name}"])
            out[..., rows].add_(functional.linear(low, self._parameters[f"lora_b_{name}"]) * self.lora_scale)
        return out

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if not any(key.startswith(f"{prefix}lora_") for key in state):
            initial = {key: value.detach() for key, value in self.state_dict().items() if key.startswith("lora_")}
            state = state | {f"{prefix}{k}": torch.zeros_like(v) if "_b_" in k else v for k, v in initial.items()}
        super()._load_from_state_dict(state, prefix, *args)


def add_lora(model: nn.Module, r: int, alpha: float, targets: Sequence[str] = ("q", "v")) -> None:
    """Freeze a transformer and add LoRA to its layers, in place.

    Args:
        r, alpha: see :class:`LoRALinear`.
        targets: "q", "k" and "v" of fused or separate layers, and names of other linear layers, such as "proj".
    Raises:
        RegistryError: a rank or scale that is not positive, or a target that the model does not have.
    """
    if not (isinstance(r, int) and r > 0 and alpha > 0):
        raise RegistryError(f"bilevel.lora: r={r} must be a positive integer and alpha={alpha} positive.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model.requires_grad_(False)
    adapted: set[str] = set()
    for path, linear in layers.items():
        leaf = path.rpartition(".")[2]
        fused = len(leaf) if leaf in ("qkv", "kv") else 1
        wanted = [t for t in targets if (t in tuple(leaf) if fused > 1 else leaf in (t, f"{t}_proj"))]
        if wanted:
            names = wanted if fused > 1 else ["all"]
            model.set_submodule(path, LoRALinear(linear, names, fused, r, alpha))
            adapted.update(wanted)
    if missing := [target for target in targets or ("none",) if target not in adapted]:
        leaves = {path.rpartition(".")[2] for path in layers}
        known = sorted({name for leaf in leaves for name in (leaf if leaf in ("qkv", "kv") else [leaf])})
        advice = f"Known: {', '.join(known)}." if known else "LoRA needs a transformer, such as vit_small_patch16_224."
        hint = did_you_mean(missing[0], known)
        raise RegistryError(f"bilevel.lora.targets: no linear layer for '{missing[0]}' in the network.{hint} {advice}")


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of the plain network: products are added to the weights, and factors removed."""
    merged = without_factors(state)
    for key, b in state.items():
        prefix, factor, name = key.rpartition("lora_b_")
        if factor and f"{prefix}lora_a_{name}" in state:
            weight = merged[f"{prefix}weight"].clone()
            rows = _rows(name, len(weight) // len(b), len(weight))
            weight[rows] += state[f"{prefix}lora_scale"] * (b @ state[f"{prefix}lora_a_{name}"])
            merged[f"{prefix}weight"] = weight
    return merged


def without_factors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the factors of LoRA."""
    return {key: value for key, value in state.items() if not _FACTOR.match(key)}


def share_frozen(source: nn.Module, target: nn.Module) -> None:
    """Let `target` use the frozen parameters of `source`, an equal network, so that they are in memory once."""
    for name, module in source.named_modules():
        other = target.get_submodule(name)
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                other._parameters[key] = parameter


def _rows(name: str, parts: int, total: int) -> slice:
    size = total // parts
    start = _PARTS[parts].index(name) * size
    return slice(start, start + size)
