"""Checkpoint layouts of other projects, one row each, and how their tensor names map to timm's."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bissl_zoo.errors import ZooError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB images scaled to [0, 1]
CAFFE = ((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255, 1 / 255, 1 / 255))  # [0, 255] with the mean subtracted

#: prefixes that saving adds to the names of a model
_WRAPPING = (
    r"(?:(?:state_dict|state_dict_ema|model|model_state_dict|model_state|model_ema)\.)?(?:module\.)?(?:_orig_mod\.)?"
)
#: the classifier of a network
CLASSIFIER = r"(?:fc|head|heads|head_dist|classifier|linear|last_linear)\."


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


def renaming(*rules: tuple[str, str]) -> Callable[[str], str]:
    """Return a function that applies regular expressions and their replacements to a name, in this order."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return rename


def _stage(pattern: str, form: str) -> tuple[tuple[str, str], ...]:
    """Return rules for torchvision's `features.1`, `.3`, `.5`, `.7`, which are the stages 0 to 3."""
    return tuple((pattern.format(2 * i + 1), form.format(i)) for i in range(4))


#: transformers (Hugging Face), with the names of versions 4 and 5: ViT, DeiT, MAE, DINOv2, DINOv3, BEiT, CLIP, SigLIP
hf_vit_name = renaming(
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.layers?|layers?|model\.layer)\.(\d+)\.", r"blocks.\2."),
    (r"(attention\.)?(attention|self_attn)\.(query|q_proj)\.", "attn.q."),
    (r"(attention\.)?(attention|self_attn)\.(key|k_proj)\.", "attn.k."),
    (r"(attention\.)?(attention|self_attn)\.(value|v_proj)\.", "attn.v."),
    (r"(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"(attention\.)*relative_position_bias\.relative_position_bias_table", "attn.relative_position_bias_table"),
    (r"(layernorm_before|layer_norm1)\.", "norm1."),
    (r"(layernorm_after|layer_norm2)\.", "norm2."),
    (r"(intermediate\.dense|mlp\.up_proj)\.", "mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"lambda_([12])$", r"gamma_\1"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.qkv.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.(layernorm|mlp)", lambda match: f"attn_pool.{'norm' if match[1] == 'layernorm' else 'mlp'}"),
)
hf_swin_name = renaming(
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"attention\.self\.relative|attention\.relative_position_bias\.relative", "attn.relative"),
    (r"attention\.(self\.)?(query|q_proj)\.", "attn.q."),
    (r"attention\.(self\.)?(key|k_proj)\.", "attn.k."),
    (r"attention\.(self\.)?(value|v_proj)\.", "attn.v."),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(?<=\d\.)output\.dense\.", "mlp.fc2."),
    (r"^layernorm\.", "norm."),
)
hf_resnet_name = renaming(
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"layer\.(\d)\.convolution\.", lambda match: f"conv{int(match[1]) + 1}."),
    (r"layer\.(\d)\.normalization\.", lambda match: f"bn{int(match[1]) + 1}."),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
)
hf_convnext_name = renaming(
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
)
torchvision_convnext_name = renaming(
    (r"^features\.0\.", "stem."),
    *_stage(r"^features\.{}\.(?=\d+\.(block|layer_scale))", "stages.{}.blocks."),
    *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
    (r"block\.0\.", "conv_dw."),
    (r"block\.2\.", "norm."),
    (r"block\.3\.", "mlp.fc1."),
    (r"block\.5\.", "mlp.fc2."),
    (r"layer_scale$", "gamma"),
    (r"^classifier\.0\.", "head.norm."),
)
torchvision_vit_name = renaming(
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"self_attention\.out_proj\.", "attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"mlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"mlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
torchvision_swin_name = renaming(
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *_stage(r"^features\.{}\.", "layers.{}.blocks."),
    *((rf"^features\.{2 * i}\.", f"layers.{i}.downsample.") for i in (1, 2, 3)),
    (r"mlp\.0\.", "mlp.fc1."),
    (r"mlp\.3\.", "mlp.fc2."),
)


def fuse(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as timm's transformers hold them: one matrix for query, key and value, no fixed buffers.

    Biases of the key are left out where timm has none (BEiT, DINOv3) if they are zero.
    """
    fused = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*attn)\.([qkv])\.(weight|bias)", name)
        if name.endswith("relative_position_index") or name in ("rope.periods", "embeddings.position_ids"):
            continue
        if name == "register_tokens" and "blocks.0.gamma_1" in expected:
            name = "storage_tokens"  # DINOv3's name, by which timm recognises its checkpoints
        if name == "pos_embed" and tensor.dim() == 2:
            tensor = tensor.unsqueeze(0)
        elif name in expected and tensor.squeeze().shape == expected[name].squeeze().shape:
            tensor = tensor.reshape(expected[name].shape)
        elif name.startswith("attn_pool.qkv."):
            kind, (width, rest) = name.rpartition(".")[2], (len(tensor) // 3, 2 * len(tensor) // 3)
            fused[f"attn_pool.q.{kind}"], fused[f"attn_pool.kv.{kind}"] = tensor.split([width, rest])
            continue
        elif match and name not in expected:
            prefix, part, kind = match.groups()
            parts = [tensors.get(f"{prefix}.{each}.{kind}") for each in "qkv"]
            together = f"{prefix}.qkv.{kind}"
            if together in expected and all(each is not None for each in parts):
                if part == "q":
                    fused[together] = torch.cat(parts)
                continue
            if kind == "bias" and (part == "k" or f"{prefix}.{part}_bias" not in expected) and not tensor.any():
                continue
            name = f"{prefix}.{part}_bias" if kind == "bias" else name
        fused[name] = tensor
    return fused


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
    head: str = CLASSIFIER
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
    Format(
        "transformers swin",
        r"(?:swin\.)?",
        marks=(r"(?:swin\.)?encoder\.layers\.0\.blocks\.0\.(?:attention|layernorm_before)\.",),
        rename=hf_swin_name,
    ),
    Format(
        "transformers convnext",
        r"(?:convnext(?:v2)?\.)?",
        marks=(r"(?:convnext(?:v2)?\.)?encoder\.stages\.0\.layers\.0\.dwconv",),
        rename=hf_convnext_name,
    ),
    Format(
        "transformers resnet",
        r"(?:resnet\.)?",
        marks=(r"(?:resnet\.)?embedder\.embedder\.convolution",),
        rename=hf_resnet_name,
    ),
    Format(
        "transformers vit",
        r"(?:(?:vit|deit|dinov2(?:_with_registers)?|dinov3_vit|beit|vision_model)\.)?",
        r"(?:classifier|decoder|lm_head|pooler\.dense|cls_classifier|distillation_classifier|text_model|text_projection|visual_projection|logit_)",
        (r"(?:\w+\.)?embeddings\.patch_embedding",),
        other=r"(?:vit\.)?(?:decoder|mask_token)|(?:text_|visual_projection|logit_)",
        rename=hf_vit_name,
        pixels=None,
    ),
    Format("torchvision swin", marks=(r"features\.1\.0\.attn\.qkv", r"features\.0\.2\."), rename=torchvision_swin_name),
    Format("torchvision convnext", marks=(r"features\.1\.0\.layer_scale",), rename=torchvision_convnext_name),
    Format("torchvision vit", marks=(r"encoder\.layers\.encoder_layer_0\.",), rename=torchvision_vit_name),
    Format("mae", "", r"(?:decoder_|mask_token|head\.)", (r"decoder_embed\.",), other=r"decoder_|mask_token"),
    Format("simmim", r"encoder\.", r"decoder\.", (r"encoder\.mask_token", r"decoder\."), other=r"encoder\.mask_token"),
    # the encoder, as timm reads it
    Format("ijepa", r"encoder\.(?:module\.)?", r"predictor\.", (r"target_encoder\.",), other=r"target_encoder\."),
    Format("lightly (dino)", r"teacher_backbone\.(?:vit\.)?", r"teacher_head\.", (r"teacher_backbone\.",)),
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
    Format("dino", r"teacher\.(?:module\.)?backbone\.", r"teacher\.(?:module\.)?head\.", other=r".*masked_embed"),
    Format("dino (student)", r"student\.(?:module\.)?backbone\.", r"student\.(?:module\.)?head\."),
    Format("byol-pytorch", r"online_encoder\.(?:net\.)?", r"online_(?:encoder\.projector|predictor)\.", pixels=None),
    Format("simsiam", r"encoder\.", r"(?:encoder\.fc|predictor)\.", (r"predictor\.",)),
    Format("bissl", r"(?:backbone\.|head\.(?=layer4\.))", r"head\.(?:projector|predictor)\.", (r"head\.projector\.",)),
    Format("bissl", r"backbone\.", r"(?:projector|predictor)\.", (r"backbone\.", r"projector_target\.")),
    Format("barlow_twins", r"backbone\.", r"(?:projector|bn)\.", (r"backbone\.", r"projector\.", r"bn\.running_mean")),
    Format("solo-learn", r"backbone\.", r"(?:projector|predictor|classifier)\.", (r"backbone\.", r"classifier\.")),
    Format(
        "lightly",
        r"backbone\.(?:vit\.)?",
        r"(?:(?:projection|prediction)_head|decoder)\.",
        (r"backbone\.(?:vit\.)?", r"(?:projection_head|decoder)\."),
        other=r"(?:backbone\.)?mask_token",
    ),
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
        f"The architecture of {source} cannot be inferred from its tensors. Name it: architecture='resnet50' "
        "(bissl new --backbone, bissl convert in --architecture)."
    )
