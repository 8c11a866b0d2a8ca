"""Checkpoints in the layouts of other projects, compared by the features of the network that is read back."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.load import read_weights

IMAGENET_MEAN = [0.485, 0.456, 0.406]


def trained(architecture="resnet18", seed=0, **model_args):
    """Return a model in which no tensor has its initial value, including batch-norm statistics."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0, **model_args).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


RESNET = trained()
STATE = RESNET.state_dict()
#: a momentum encoder or a student, which must not be read; stored as one number per tensor
OTHER = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in STATE.items()}
LINEAR = {"weight": torch.randn(8, 512), "bias": torch.randn(8)}
MLP = {"0.weight": torch.randn(64, 512), "1.running_mean": torch.randn(64), "3.weight": torch.randn(8, 64)}


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def lightly_names(state):
    """Return the state under the names of `nn.Sequential(*list(resnet18().children())[:-1])`."""
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    names = zip(model.state_dict(), nn.Sequential(*list(model.children())[:-1]).state_dict(), strict=True)
    return {renamed: state[name] for name, renamed in names}


#: tensors in the files that the public training code of each project saves, by format, and by keys of nested
#: dictionaries and a prefix of their names, separated by "|"
CHECKPOINTS = {
    "torchvision": {"": STATE, "fc.": LINEAR},
    "timm": {"state_dict|": STATE},
    "moco_v1": {
        "state_dict|module.encoder_q.": STATE,
        "state_dict|module.encoder_q.fc.": LINEAR,
        "state_dict|module.encoder_k.": OTHER,
        "state_dict|module.": {"queue": torch.randn(8, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)},
        "optimizer|state|0|": {"momentum_buffer": torch.randn(3)},
    },
    "moco_v2": {
        "state_dict|module.encoder_k.": OTHER,
        "state_dict|module.encoder_q.": STATE,
        "state_dict|module.encoder_q.fc.": MLP,
    },
    "moco_v3": {
        "state_dict|module.base_encoder.": STATE,
        "state_dict|module.base_encoder.fc.": MLP,
        "state_dict|module.momentum_encoder.": OTHER,
        "state_dict|module.predictor.": MLP,
    },
    "simsiam": {
        "state_dict|module.encoder.": STATE,
        "state_dict|module.encoder.fc.": MLP,
        "state_dict|module.predictor.": MLP,
    },
    "dino": {
        "student|module.backbone.": OTHER,
        "student|module.head.mlp.": MLP,
        "teacher|module.backbone.": STATE,
        "teacher|module.head.mlp.": MLP,
        "dino_loss|": {"center": torch.zeros(1, 8)},
    },
    "barlow_twins": {
        "model|module.backbone.": STATE,
        "model|module.projector.": MLP,
        "model|module.bn.": {"running_mean": torch.zeros(8), "running_var": torch.ones(8)},
    },
    "vicreg": {"model|module.backbone.": STATE, "model|module.projector.": MLP},
    "swav": {
        "module.": STATE,
        "module.projection_head.": MLP,
        "module.prototypes.": {"weight": torch.randn(30, 8)},
    },
    "solo-learn": {
        "state_dict|backbone.": STATE,
        "state_dict|classifier.": LINEAR,
        "state_dict|projector.": MLP,
        "state_dict|momentum_backbone.": OTHER,
        "optimizer_states|0|": {"mu": torch.randn(4)},
    },
    "lightly": {
        "state_dict|backbone.": lightly_names(STATE),
        "state_dict|projection_head.layers.": MLP,
        "state_dict|backbone_momentum.": lightly_names(OTHER),
    },
    "vissl": {
        "classy_state_dict|base_model|model|trunk|_feature_blocks.": STATE,
        "classy_state_dict|base_model|model|heads|0.clf.0.": LINEAR,
    },
    "byol-pytorch": {
        "online_encoder.net.": STATE,
        "online_encoder.projector.net.": MLP,
        "target_encoder.net.": OTHER,
    },
    "bissl": {
        "backbone.": STATE,
        "head.projector.": MLP,
        "head.predictor.": MLP,
        "backbone_target.": OTHER,
        "projector_target.": MLP,
    },
    "backbone": {"backbone.": STATE},
}


def checkpoint(layout):
    """Return the content of the file of a project."""
    content = {"epoch": 200, "arch": "resnet18"} if layout == "moco_v1" else {}
    for place, tensors in CHECKPOINTS[layout].items():
        *keys, prefix = place.split("|")
        node = content
        for key in keys:
            node = node.setdefault(key, {})
        node |= under(prefix, tensors)
    return content


def assert_equal_states(state, expected):
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def written(tmp_path, content, name="checkpoint.pth"):
    path = tmp_path / name
    torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_a_checkpoint_of_each_project_has_the_features_of_its_network(tmp_path, layout):
    read = read_weights(written(tmp_path, checkpoint(layout)))
    assert read.format == layout and read.architecture == "resnet18"  # inferred from its blocks
    assert_equal_states(read.state, STATE)
    assert len(read.state) == 120 and read.missing == []
    assert bool(read.head) == (layout not in ("timm", "backbone"))
    if read.pixels:
        assert read.pixels["mean"] == IMAGENET_MEAN and read.pixels["channel_order"] == "RGB"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet34", "resnet50", "resnet152"])
def test_deeper_resnets_are_distinguished(tmp_path, architecture):
    with torch.device("meta"):
        state = timm.create_model(architecture, num_classes=0).state_dict()
    state = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}
    assert read_weights(written(tmp_path, state)).architecture == architecture


@pytest.mark.parametrize("architecture", ["wide_resnet50_2", "test_vit"])
def test_an_architecture_that_cannot_be_inferred_must_be_named(tmp_path, architecture):
    with torch.device("meta"):
        state = timm.create_model(architecture, num_classes=0).state_dict()
    state = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(ZooError, match="Name it"):
        read_weights(written(tmp_path, state))


def test_heads_keep_their_names_and_values(tmp_path):
    read = read_weights(written(tmp_path, checkpoint("bissl")), "resnet18")
    assert read.head.keys() == {*under("head.projector.", MLP), *under("head.predictor.", MLP)}
    assert torch.equal(read.head["head.projector.0.weight"], MLP["0.weight"])
    assert any(name.startswith("backbone_target.conv1.weight (64, 3, 7, 7)") for name in read.unexpected)


def test_the_bissl_authors_c4_layout_has_layer4_in_its_head(tmp_path):
    trunk = {name: tensor for name, tensor in STATE.items() if not name.startswith("layer4.")}
    moved = {name: tensor for name, tensor in STATE.items() if name.startswith("layer4.")}
    whole = {**under("backbone.", trunk), **under("head.", moved), **under("head.projector.", MLP)}
    read = read_weights(written(tmp_path, whole), "resnet18")
    assert read.format == "bissl"
    assert_equal_states(read.state, STATE)
    assert read.head.keys() == under("head.projector.", MLP).keys()

    alone = written(tmp_path, trunk)
    with pytest.raises(ZooError, match=r"90 of 120 tensors match.*ends at layer3, as a C4 backbone does"):
        read_weights(alone, "resnet18")
    read = read_weights(alone, "resnet18", allow_partial=True)
    assert read.state.keys() == trunk.keys()
    assert len(read.missing) == 30 and read.missing[0] == "layer4.0.conv1.weight (512, 256, 3, 3)"


def test_a_file_of_the_bissl_authors_with_the_head_alone_is_refused(tmp_path):
    head = written(tmp_path, {**under("projector.", MLP), **under("predictor.", MLP)})
    with pytest.raises(ZooError, match="pretext head: give the file of the backbone"):
        read_weights(head, "resnet18")


def test_safetensors_and_the_old_format_of_torch_are_read(tmp_path):
    save_file(STATE, tmp_path / "weights.safetensors")
    assert_equal_states(read_weights(tmp_path / "weights.safetensors", "resnet18").state, STATE)
    torch.save(checkpoint("moco_v2"), tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert_equal_states(read_weights(tmp_path / "old.pth.tar", "resnet18").state, STATE)


def test_half_precision_is_read_as_float32(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in STATE.items()}
    read = read_weights(written(tmp_path, half), "resnet18")
    assert {t.dtype for name, t in read.state.items() if not name.endswith("tracked")} == {torch.float32}
    assert_equal_states(read.state, {n: t.half().float() if t.is_floating_point() else t for n, t in STATE.items()})


def test_files_without_num_batches_tracked_are_complete(tmp_path):
    state = {name: tensor for name, tensor in STATE.items() if not name.endswith("num_batches_tracked")}
    read = read_weights(written(tmp_path, state), "resnet18")
    assert_equal_states(read.state, {n: torch.tensor(0) if n.endswith("tracked") else t for n, t in STATE.items()})
    assert any("num_batches_tracked of 20 batch norms" in note for note in read.notes)


VIT_IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "heads"), [("dino", 6), ("moco_v3", 12)])
def test_vits_have_the_features_of_their_projects(tmp_path, layout, heads):
    torch.manual_seed(2)
    original = timm.create_model("vit_small_patch16_224", num_classes=0, num_heads=heads, depth=12).eval()
    state = original.state_dict()
    if layout == "dino":
        content = {"teacher": {**under("backbone.", state), **under("head.mlp.", MLP)}}
    else:
        prefix = "module.base_encoder."
        content = {"state_dict": {**under(prefix, state), **under(f"{prefix}head.", MLP)}}
    read = read_weights(written(tmp_path, content), "vit_small_patch16_224")
    assert read.format == layout and read.missing == [] and read.head
    again = timm.create_model(read.architecture, num_classes=0, **read.model_args).eval()
    again.load_state_dict(read.state)
    with torch.no_grad():
        assert torch.equal(again(VIT_IMAGES), original(VIT_IMAGES))
    assert read.model_args == ({"num_heads": 12} if heads == 12 else {})
    assert read.pixels["mean"] == IMAGENET_MEAN  # not the 0.5 of timm's own ViTs


def test_a_timm_name_is_read_through_timm(tmp_path):
    from bissl_zoo.weights.export import export_backbone

    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    export_backbone(STATE, "resnet18", "timm", tmp_path / "entry", pixels=pixels)
    read = read_weights(f"timm:local-dir:{tmp_path / 'entry'}", "resnet18")
    assert_equal_states(read.state, STATE)
    assert read.pixels == {"channel_order": "RGB", "input_size": [3, 224, 224], **pixels}
    with pytest.raises(ZooError, match="is a resnet18, not a resnet50"):
        read_weights(f"timm:local-dir:{tmp_path / 'entry'}", "resnet50")
    with pytest.raises(ZooError, match="holds no model: it needs config.json"):
        read_weights(f"timm:local-dir:{tmp_path}")


def test_a_timm_name_without_weights_is_refused():
    for name in ("cspresnet50d", "resnet50.no_such_tag", "resnet19"):
        with pytest.raises(ZooError, match=f"has no weights '{name}'"):
            read_weights(f"timm:{name}")


def test_a_file_of_another_architecture_is_refused_with_names_and_shapes(tmp_path):
    path = written(tmp_path, checkpoint("moco_v2"))
    with pytest.raises(ZooError) as refused:
        read_weights(path, "resnet50")
    message = str(refused.value)
    assert "layout 'moco_v2'" in message and "of 318 tensors match" in message
    assert "layer1.0.conv1.weight (64, 64, 1, 1), in the file (64, 64, 3, 3)" in message


def test_tensors_unknown_to_the_architecture_are_refused(tmp_path):
    state = {**STATE, "layer1.0.se.fc1.weight": torch.randn(4, 64, 1, 1)}
    with pytest.raises(ZooError, match=r"unknown to resnet18: layer1.0.se.fc1.weight \(4, 64, 1, 1\)"):
        read_weights(written(tmp_path, state), "resnet18")
