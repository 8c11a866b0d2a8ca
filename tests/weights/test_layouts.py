"""Transformers and ConvNeXt in the layouts of their projects, compared by the outputs of the source's own network."""

import re

import pytest
import timm
import torch
import torchvision

from bissl_zoo.weights.load import read_weights

VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
ATTO = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}


def trained(network):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.2))
    return network.eval()


def timm_model(name="vit_base_patch16_224", **args):
    return trained(timm.create_model(name, num_classes=0, **{**VIT, **args} if name.startswith("vit") else args))


def changed(state, *rules):
    """Return the state with names after regular expressions and their replacements."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_qkv(state, block, names):
    """Return the state with three matrices for query, key and value."""
    split = {name: tensor for name, tensor in state.items() if ".qkv." not in name}
    for name, tensor in state.items():
        if match := re.fullmatch(block + r"attn\.qkv\.(weight|bias)", name):
            for part, values in zip(names, tensor.chunk(3), strict=True):
                split[f"{name.partition('attn')[0]}{part}.{match[1]}"] = values
    return split


#: names of transformers (Hugging Face), from its public files: ViT, DINOv2, Swin
HF_BLOCK = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^blocks", "encoder.layer"),
    (r"attn\.proj", "attention.output.dense"),
    (r"^norm\.", "layernorm."),
)
HF_VIT = (*HF_BLOCK, (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"))
HF_VIT += ((r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"))
HF_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
HF_SWIN = (
    (
        r"^patch_embed\.(proj|norm)",
        lambda m: f"embeddings.{'patch_embeddings.projection' if m[1] == 'proj' else 'norm'}",
    ),
    (r"^layers", "encoder.layers"),
    (r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"),
    (r"(blocks.\d\.)norm1", r"\1layernorm_before"),
    (r"(blocks.\d\.)norm2", r"\1layernorm_after"),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.relative", "attention.self.relative"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"^norm\.", "layernorm."),
)


def hugging_face():
    vit = timm_model()
    state = changed(without_qkv(vit.state_dict(), r"blocks\.\d\.", HF_QKV), *HF_VIT)
    yield "transformers vit", under("vit.", state) | {"classifier.weight": torch.ones(2, 32)}, vit
    vit = timm_model("vit_base_patch14_dinov2", img_size=28)
    state = changed(
        without_qkv(vit.state_dict(), r"blocks\.\d\.", HF_QKV), *HF_BLOCK, (r"ls(\d)\.gamma", r"layer_scale\1.lambda1")
    )
    yield "transformers vit", {**state, "embeddings.mask_token": torch.zeros(1, 32)}, vit
    swin = timm_model("swin_tiny_patch4_window7_224", **SWIN)
    names = [f"attention.self.{part}" for part in ("query", "key", "value")]
    state = changed(without_qkv(swin.state_dict(), r"layers\.\d\.blocks\.\d\.", names), *HF_SWIN)
    yield "transformers swin", under("swin.", state), swin
    convnext = timm_model("convnextv2_atto", **ATTO)
    rules = [(r"^stem\.0", "embeddings.patch_embeddings"), (r"^stem\.1", "embeddings.layernorm")]
    rules += [
        (r"(stages\.\d)\.downsample", r"encoder.\1.downsampling_layer"),
        (r"(stages\.\d)\.blocks", r"encoder.\1.layers"),
    ]
    rules += [
        (r"conv_dw", "dwconv"),
        (r"(layers\.\d)\.norm", r"\1.layernorm"),
        (r"mlp\.fc", "pwconv"),
        (r"mlp\.grn", "grn"),
    ]
    state = changed(convnext.state_dict(), *rules, (r"head\.norm", "layernorm"))
    linear = {
        k: v.reshape(1, 1, 1, -1) if "grn" in k else v.flatten(1) if "pwconv" in k and "weight" in k else v
        for k, v in state.items()
    }
    yield "transformers convnext", under("convnextv2.", linear), convnext
    resnet = trained(timm.create_model("resnet18", num_classes=0))
    rules = [(r"^conv1", "embedder.embedder.convolution"), (r"^bn1", "embedder.embedder.normalization")]
    rules += [(r"^layer(\d)\.(\d)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}")]
    rules += [
        (r"\.conv(\d)", lambda m: f".layer.{int(m[1]) - 1}.convolution"),
        (r"downsample\.0", "shortcut.convolution"),
    ]
    rules += [
        (r"\.bn(\d)", lambda m: f".layer.{int(m[1]) - 1}.normalization"),
        (r"downsample\.1", "shortcut.normalization"),
    ]
    yield "transformers resnet", under("resnet.", changed(resnet.state_dict(), *rules)), resnet


def official():
    vit = timm_model()
    state, other = vit.state_dict(), {name: tensor * 0 for name, tensor in vit.state_dict().items()}
    head = {"head.weight": torch.ones(4, 32), "head.bias": torch.ones(4)}
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.ones(16, 32),
        "decoder_norm.bias": torch.ones(16),
    }
    yield "mae", {"model": {**state, **decoder}}, vit
    yield "timm", {"model": {**state, **head}}, vit  # DeiT, fine-tuned MAE, DINO
    yield (
        "simmim",
        {
            "model": {
                **under("encoder.", state),
                "encoder.mask_token": torch.zeros(1, 1, 32),
                "decoder.0.bias": torch.ones(4),
            }
        },
        vit,
    )
    yield (
        "ijepa",
        {
            "encoder": under("module.", state),
            "target_encoder": under("module.", other),
            "predictor": {"x": torch.ones(2)},
        },
        vit,
    )
    yield "dino", {"teacher": {**under("backbone.", state), "backbone.masked_embed": torch.ones(1, 32)}}, vit  # iBOT
    yield (
        "lightly (dino)",
        {"state_dict": {**under("student_backbone.vit.", other), **under("teacher_backbone.vit.", state)}},
        vit,
    )
    masked = {**under("backbone.vit.", state), "backbone.mask_token": torch.ones(1, 1, 32), "decoder.x": torch.ones(2)}
    yield "lightly", masked, vit
    dino = timm_model("vit_base_patch14_dinov2", img_size=28)
    yield "timm", {**dino.state_dict(), "mask_token": torch.zeros(1, 32)}, dino
    dino = timm_model("vit_base_patch14_reg4_dinov2", img_size=28)
    state, place = dict(dino.state_dict()), torch.randn(1, 1, 32)
    state |= {"cls_token": state["cls_token"] - place, "pos_embed": torch.cat([place, state["pos_embed"]], 1)}
    yield "timm", {**changed(state, ("reg_token", "register_tokens")), "mask_token": torch.zeros(1, 32)}, dino
    dino = timm_model("vit_small_patch16_dinov3_qkvb")
    state = changed(dino.state_dict(), ("reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    for name in [name for name in state if name.endswith("q_bias")]:
        values = [state.pop(name), torch.zeros(32), state.pop(name.replace("q_bias", "v_bias"))]
        state[name.replace("q_bias", "qkv.bias")] = torch.cat(values)
        state.pop(name.replace("q_bias", "k_bias"), None)
    yield "timm", {**state, "mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}, dino
    swin = timm_model("swin_tiny_patch4_window7_224", **SWIN)
    state = changed(swin.state_dict(), (r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"))
    yield "timm", {"model": {**state, "layers.0.blocks.1.attn_mask": torch.ones(4, 4, 4)}}, swin
    convnext = timm_model("convnext_atto", conv_mlp=False, **ATTO)
    rules = [
        (r"^stem", "downsample_layers.0"),
        (r"stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks", ""),
    ]
    rules += [("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"head\.norm", "norm")]
    yield "timm", {"model": {**changed(convnext.state_dict(), *rules), "head.weight": torch.ones(2, 32)}}, convnext


def torchvision_networks():
    models = torchvision.models
    settings = [models.convnext.CNBlockConfig(a, b, 1) for a, b in ((8, 16), (16, 24), (24, 32), (32, None))]
    convnext = trained(models.convnext.ConvNeXt(settings))
    yield (
        "torchvision convnext",
        convnext.state_dict(),
        Embedding(
            "convnext_atto", lambda x: convnext.classifier[:2](convnext.avgpool(convnext.features(x))).flatten(1)
        ),
    )
    vit = trained(models.vision_transformer.VisionTransformer(32, 16, 2, 2, 32, 128))

    def class_token(x):
        patches = vit._process_input(x)
        return vit.encoder(torch.cat([vit.class_token.expand(len(x), -1, -1), patches], 1))[:, 0]

    yield "torchvision vit", vit.state_dict(), Embedding("vit_base_patch16_224", class_token)
    swin = trained(models.swin_transformer.SwinTransformer([4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], [2, 2]))
    embed = Embedding("swin_tiny_patch4_window7_224", lambda x: swin.norm(swin.features(x)).mean(dim=(1, 2)))
    yield "torchvision swin", swin.state_dict(), embed


class Embedding:
    """The embedding of another library's network, and timm's name for it."""

    def __init__(self, name, embed):
        self.default_cfg, self.embed = {"architecture": name}, embed

    def __call__(self, images):
        return self.embed(images)


#: arguments of the small networks, by the beginning of timm's name
ARGUMENTS = {
    "vit_base_patch14": {**VIT, "img_size": 28},
    "vit": VIT,
    "swin": SWIN,
    "convnext_": {"conv_mlp": False, **ATTO},
    "convnextv2": ATTO,
    "resnet": {},
}


@pytest.mark.parametrize("networks", [hugging_face, official, torchvision_networks])
def test_networks_of_each_project_have_the_outputs_of_their_source(tmp_path, networks):
    for layout, content, source in networks():
        torch.save(content, tmp_path / "checkpoint.pth")
        name = source.default_cfg["architecture"]
        args = next(args for start, args in ARGUMENTS.items() if name.startswith(start))
        model = timm.create_model(name, num_classes=0, **args).eval()
        read = read_weights(tmp_path / "checkpoint.pth", name, lambda _, model=model: model)
        assert read.format == layout and not read.missing
        model.load_state_dict(read.state)
        images = torch.randn(2, 3, *[args.get("img_size", 64)] * 2)
        with torch.no_grad():
            torch.testing.assert_close(model(images), source(images), rtol=1e-4, atol=2e-5)
