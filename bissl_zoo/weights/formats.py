"""Checkpoint layouts of other projects, one row each, and how their tensor names map to timm's."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bissl_zoo.errors import ZooError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB images scaled to [0, 1]
CAFFE = ((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255, 1 / 255, 1 / 255))  # [0, 255] with the mean subtracted

#: prefixes that saving adds to the names of a model
_WRAPPING = (
    r"(?:(?:state_dict|state_dict_ema|model|model_state_dict|model_state|model_ema)\.)?(?:module\.)?(?:_orig_mod\.)?"
)
_CLASSIFIER = r"(?:fc|head|heads|classifier|linear|last_linear)\."


def torchvision_name(name: str) -> str:
    """Return timm's name of a torchvision tensor; only those of `nn.Sequential(*resnet.children())` differ."""
    parts = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    first, _, rest = name.partition(".")
    return f"{parts[first]}.{rest}" if first in parts else name


def detectron2_name(name: str) -> str:
    """Return timm's name of a tensor of Detectron2's ResNet: `res2.0.conv1.norm.weight` is `layer1.0.bn1.weight`."""
    name = re.sub(r"^stem\.", "", name)
    name = re.sub(r"^res([2-5])\.", lambda stage: f"layer{int(stage[1]) - 1}.", name)
    name = re.sub(r"conv([123])\.norm\.", r"bn\1.", name)
    return re.sub(r"\.shortcut\.(norm\.)?", lambda match: f".downsample.{1 if match[1] else 0}.", name)


def caffe2_name(name: str) -> str:
    """Return timm's name of a Caffe2 (Detectron, MSRA) tensor: `res2_0_branch2a_bn_s` is `layer1.0.bn1.weight`."""
    kinds = {"w": "weight", "b": "bias"}
    norms = {"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias", "rm": "running_mean", "riv": "running_var"}
    match = re.fullmatch(r"(?:(?:res_)?(conv1)|res([2-5])_(\d+)_branch(1|2[abc]))_(bn_)?(\w+)", name)
    if not match:
        return name
    stem, stage, block, branch, norm, kind = match.groups()
    kind = norms.get(kind, kind) if norm else kinds.get(kind, kind)
    if stem:
        return f"{'bn1' if norm else 'conv1'}.{kind}"
    if branch == "1":
        return f"layer{int(stage) - 1}.{block}.downsample.{1 if norm else 0}.{kind}"
    return f"layer{int(stage) - 1}.{block}.{'bn' if norm else 'conv'}{'abc'.index(branch[1]) + 1}.{kind}"


@dataclass(frozen=True)
class Format:
    """Location of the backbone in the checkpoints of a project; patterns are matched after the prefixes of saving.

    Args:
        backbone: prefix of the backbone's tensors.
        head: prefixes of the classifier or pretext head.
        marks: prefixes that must all exist; they distinguish formats with the same backbone prefix.
        other: tensors under the backbone's prefix that belong to neither part.
        rename: maps the name after the prefix to timm's.
        pixels: mean and std in the project's public training code; None if unknown.
    """

    name: str
    backbone: str = ""
    head: str = _CLASSIFIER
    marks: tuple[str, ...] = ()
    other: str = r"(?!)"
    rename: Callable[[str], str] = torchvision_name
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = IMAGENET

    def fits(self, names: Iterable[str]) -> bool:
        """Return True if every mark exists."""
        return all(any(re.match(_WRAPPING + mark, name) for name in names) for mark in self.marks)

    def backbone_name(self, name: str) -> str | None:
        """Return timm's name of a tensor under the backbone's prefix, otherwise None."""
        prefix = re.match(_WRAPPING + self.backbone, name)
        return self.rename(name[prefix.end() :]) if prefix else None

    def head_name(self, name: str) -> str | None:
        """Return the name of a tensor of the head without prefixes of saving, otherwise None."""
        match = re.match(f"({_WRAPPING}){self.head}", name)
        return name[match.end(1) :] if match else None

    def is_other(self, name: str) -> bool:
        """Return True for a tensor under the backbone's prefix that belongs to another part."""
        return re.match(f"{_WRAPPING}(?:{self.other})", name) is not None


#: The most specific first. Sources: the public training and conversion code of each project.
FORMATS = (
    # Caffe2 blobs: Detectron, and the MSRA models that Detectron2 starts from. As in Detectron2, the biases of
    # convolutions before a batch norm are left out.
    Format(
        "caffe2",
        r"(?:blobs\.)?",
        r"(?:blobs\.)?(?:fc1000|pred)_",
        (r"(?:blobs\.)?conv1_w$",),
        r"(?:blobs\.)?(?:(?:conv1|res\d_\d+_branch[12][abc]?)_b$|.*_momentum$|.*(?:rpn|fpn|bbox|cls|fc6|fc7|mask|kps))",
        caffe2_name,
        CAFFE,
    ),
    Format(
        "detectron2",
        r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.(?=res5\.\d))?",
        r"(?:backbone\.(?:bottom_up\.)?)?(?:stem\.)?(?:fc|linear)\.",
        (r"(?:backbone\.(?:bottom_up\.)?)?stem\.conv1\.weight",),
        r"proposal_generator|roi_heads|(?:backbone\.)?(?:fpn_|top_block)|sem_seg_head|head\.|pixel_|anchor",
        detectron2_name,
        None,  # RGB or BGR: see `load.find_pixels`
    ),
    Format(
        "vissl",
        r"(?:classy_state_dict\.base_model\.model\.)?(?:trunk\.)?(?:base_model\.)?_feature_blocks\.",
        r"(?:classy_state_dict\.base_model\.model\.)?heads\.",
    ),
    Format("moco_v3", r"base_encoder\.", r"(?:base_encoder\.(?:fc|head)|predictor)\."),
    Format("moco_v2", r"encoder_q\.", r"encoder_q\.fc\.", (r"encoder_q\.fc\.0\.",)),
    Format("moco_v1", r"encoder_q\.", r"encoder_q\.fc\."),
    Format("dino", r"teacher\.(?:module\.)?backbone\.", r"teacher\.(?:module\.)?head\."),
    Format("dino (student)", r"student\.(?:module\.)?backbone\.", r"student\.(?:module\.)?head\."),
    Format("byol-pytorch", r"online_encoder\.(?:net\.)?", r"online_(?:encoder\.projector|predictor)\.", pixels=None),
    Format("simsiam", r"encoder\.", r"(?:encoder\.fc|predictor)\.", (r"predictor\.",)),
    Format("bissl", r"(?:backbone\.|head\.(?=layer4\.))", r"head\.(?:projector|predictor)\.", (r"head\.projector\.",)),
    Format("bissl", r"backbone\.", r"(?:projector|predictor)\.", (r"backbone\.", r"projector_target\.")),
    Format("barlow_twins", r"backbone\.", r"(?:projector|bn)\.", (r"backbone\.", r"projector\.", r"bn\.running_mean")),
    Format("solo-learn", r"backbone\.", r"(?:projector|predictor|classifier)\.", (r"backbone\.", r"classifier\.")),
    Format("lightly", r"backbone\.", r"(?:projection|prediction)_head\.", (r"backbone\.", r"projection_head\.")),
    Format("vicreg", r"backbone\.", r"projector\.", (r"backbone\.", r"projector\.")),
    Format("backbone", r"backbone\.", r"(?:projector|predictor|head)\.", pixels=None),
    Format("encoder", r"encoder\.", r"(?:encoder\.fc|projector|predictor|head)\.", pixels=None),
    Format("swav", "", r"(?:projection_head|prototypes)\.", (r"prototypes\.",)),
    Format("torchvision", marks=(r"fc\.weight$",)),
    Format("timm", pixels=None),
)

#: by (bottleneck blocks, number of blocks in each stage)
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def infer_architecture(tensors: Mapping[str, Tensor], source: str | Path = "these tensors") -> str:
    """Return timm's name of the plain ResNet in a checkpoint, from the number and kind of its blocks.

    Raises:
        ZooError: the tensors are not of a plain ResNet.
    """
    for layout in FORMATS:
        if not layout.fits(tensors):
            continue
        renamed = {layout.backbone_name(name): tensor for name, tensor in tensors.items()}
        blocks = [{key.split(".")[1] for key in renamed if key and key.startswith(f"layer{i}.")} for i in range(1, 5)]
        name = _RESNETS.get(("layer1.0.conv3.weight" in renamed, tuple(len(stage) for stage in blocks)))
        widths = [tuple(renamed[key].shape) for key in ("conv1.weight", "layer1.0.conv2.weight") if key in renamed]
        if name and widths == [(64, 3, 7, 7), (64, 64, 3, 3)]:
            return name
    raise ZooError(
        f"The architecture of {source} cannot be inferred from its tensors. Name it: architecture='resnet50'."
    )
