import pytest
import timm
import torch

from bissl_zoo.backbones import FeatureInfo, Pool, SplitError, merge_split_states, share, tail_input
from bissl_zoo.errors import ConfigError, RegistryError
from bissl_zoo.registry import build_backbone

EVERY_STAGE = [
    ("test_resnet", {}, ("c1", "c2", "c3", "c4", "c5")),
    ("test_efficientnet", {}, ("c1", "c2", "c3", "c4", "c5")),
    ("test_vit", {"class_token": False, "global_pool": "avg"}, tuple(f"blocks.{i}" for i in range(6))),
]
SPLITS = [(name, kwargs, stage) for name, kwargs, stages in EVERY_STAGE for stage in stages] + [
    pytest.param("resnet50", {}, "c4", marks=pytest.mark.slow),  # the shared part of a C4 detector
    ("resnet18", {}, "c4"),
    ("convnext_atto", {}, "c3"),
    ("mobilenetv3_small_050", {}, "c4"),
    ("regnetx_002", {}, "c3"),
]


def build(name, **kwargs):
    torch.manual_seed(0)
    return build_backbone(name=name, **kwargs)


def images(backbone, batch=4, size=64, seed=1):
    cfg = backbone.model.pretrained_cfg
    size = cfg["input_size"][-1] if cfg.get("fixed_input_size") else size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def buffers(state):
    return {name: tensor for name, tensor in state.items() if "running" in name or "num_batches" in name}


@pytest.mark.parametrize("name, kwargs, stage", SPLITS)
def test_split_is_bit_equal_to_the_whole_and_partitions_its_parameters(name, kwargs, stage):
    whole = build(name, **kwargs)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    trunk, tail = whole.split(stage)
    merged = merge_split_states(trunk.state_dict(), tail.state_dict())
    assert not set(trunk.state_dict()) & set(tail.state_dict()) and set(merged) == set(state)
    assert all(torch.equal(merged[key], state[key]) for key in merged)
    x = images(whole)
    # in train mode first, which also moves the batch-norm statistics that eval mode then uses
    for mode in (True, False):
        for module in (whole, trunk, tail):
            module.train(mode)
        outputs = []
        for run in (whole.model, lambda x: tail(trunk(x)[stage])):
            torch.manual_seed(2)  # for stochastic depth and dropout
            outputs.append(run(x))
        assert torch.equal(*outputs)
        assert outputs[1].shape == (len(x), tail.num_features)
    parts = merge_split_states(trunk.state_dict(), tail.state_dict())
    for key, value in buffers(whole.state_dict()).items():
        assert torch.equal(parts[key], value), key


def test_splitting_does_not_change_the_whole():
    whole = build("test_resnet", drop_path_rate=0.5).train()
    frozen = whole.model.bn1.eval()  # as a user freezes batch norm
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    whole.split("c3")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    assert whole.training and whole.model.layer1.training and not frozen.training
    assert not any(module._forward_hooks for module in whole.modules())


def test_a_trunk_returns_the_earlier_maps_that_are_asked_for_and_its_tail_takes_the_last():
    whole = build("test_resnet", out_features=("c2", "c3", "c4", "c5")).eval()
    trunk, tail = whole.split("c4", ("c3", "c2"))
    x = images(whole)
    maps, expected = trunk(x), whole(x)
    assert trunk.out_features == ("c2", "c3", "c4") and list(maps) == ["c2", "c3", "c4"]
    assert all(torch.equal(value, expected[stage]) for stage, value in maps.items())
    assert torch.equal(tail(maps["c4"]), whole.model(x))


def test_a_map_beyond_the_split_is_refused():
    with pytest.raises(SplitError, match="split after 'c3', so its trunk has no map 'c4'"):
        build("test_resnet").split("c3", ("c2", "c4", "c5"))
    with pytest.raises(SplitError, match=r"no stage 'c22'\. Did you mean 'c2'"):
        build("test_resnet").split("c3", ("c22",))


def test_a_trunk_knows_only_the_stages_it_has():
    trunk, _ = build("test_resnet").split("c3")
    assert trunk.stages == ["c1", "c2", "c3"] and trunk.out_features == ("c3",)
    with pytest.raises(SplitError, match="Stages: c1, c2, c3"):
        trunk.split("c4")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_efficientnet", "regnetx_002"])
def test_feature_maps_equal_timms_features_only(name):
    ours = build(name)
    ours = build(name, out_features=ours.stages).eval()
    reference = timm.create_model(name, features_only=True).eval()
    # features_only joins the first two parts of a name, and has no final norm
    theirs = {key.replace("stages.", "stages_").replace("stem.", "stem_"): v for key, v in ours.state_dict().items()}
    theirs = {**ours.state_dict(), **theirs}
    assert not reference.load_state_dict(theirs, strict=False).missing_keys
    x = images(ours, batch=1, size=96)
    with torch.no_grad():
        maps, expected = ours(x), reference(x)
    infos = list(ours.feature_info.values())
    assert [info.channels for info in infos] == reference.feature_info.channels()
    assert [info.stride for info in infos] == reference.feature_info.reduction()
    assert list(maps) == ours.stages
    for (stage, features), theirs in zip(maps.items(), expected, strict=True):
        assert features.shape == theirs.shape == (1, ours.feature_info[stage].channels, *features.shape[2:])
        assert features.shape[-1] == 96 // ours.feature_info[stage].stride
        torch.testing.assert_close(features, theirs, rtol=1e-5, atol=1e-6)  # the same layers, wrapped differently


def test_only_the_stages_asked_for_are_returned_shallow_to_deep():
    backbone = build("test_resnet", out_features=("c4", "c2"))
    assert list(backbone(images(backbone))) == ["c2", "c4"]
    assert list(build("test_resnet")(images(backbone))) == ["c5"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit"])
def test_weights_are_exchanged_with_timm_both_ways(name):
    backbone, model = build(name).eval(), timm.create_model(name, num_classes=0).eval()
    assert list(backbone.state_dict()) == list(model.state_dict())
    x = images(backbone, batch=1)
    with torch.no_grad():
        model.load_state_dict(backbone.state_dict())
        assert torch.equal(model(x), backbone.model(x))
        fresh = timm.create_model(name, num_classes=0).eval()
        given = fresh.state_dict()
        backbone.load_state_dict(given)
        assert torch.equal(fresh(x), backbone.model(x))
    assert list(given) == list(fresh.state_dict())  # loading does not rename the caller's keys


def test_names_hold_inside_another_module_too():
    holder = torch.nn.ModuleDict({"backbone": build("test_resnet")})
    state = holder.state_dict()
    assert "backbone.conv1.0.weight" in state or "backbone.conv1.weight" in state
    other = torch.nn.ModuleDict({"backbone": build_backbone(name="test_resnet")})
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_missing_and_unexpected_keys_are_refused():
    backbone = build("test_resnet")
    state = backbone.state_dict()
    key = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        backbone.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        backbone.load_state_dict({**state, "fc.weight": torch.zeros(1)})


def test_a_vit_with_a_class_token_is_shared_whole_or_built_without_it():
    with pytest.raises(SplitError, match=r"'test_vit' cannot be split.*shared_stage=null.*class_token=False"):
        build("test_vit").split("blocks.2")


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_any_family_is_shared_whole_and_pooled_as_timm_does(name):
    whole = build(name).eval()
    trunk, tail = share(whole)
    assert set(merge_split_states(trunk.state_dict(), tail.state_dict())) == set(whole.state_dict())
    x, stage = images(whole, batch=2), whole.stages[-1]
    with torch.no_grad():
        features = trunk.eval()(x)
        assert torch.equal(tail.eval()(tail_input(features, stage)), whole.model(x))
        grid, info = features[stage].shape[2:], whole.feature_info[stage]
        assert features[stage].shape == (2, info.channels, *grid) and grid[0] == x.shape[-1] // info.stride
        assert tail.num_features == whole.model.head_hidden_size


#: prefix tokens (class, registers), rotary positions, attention pooling
TOKENS = [
    ("vit_tiny_patch16_224", {"class_token": True, "reg_tokens": 2, "global_pool": "token"}, 3),
    ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 2}, 1),
    ("vit_tiny_patch16_dinov3_qkvb", {"img_size": 64, "depth": 2}, 5),
    ("vit_base_patch16_clip_224", {"img_size": 64, "depth": 1, "embed_dim": 64, "num_heads": 2}, 1),
    ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 1, "embed_dim": 64, "num_heads": 2}, 0),
]


@pytest.mark.parametrize("name, args, prefix", TOKENS)
def test_a_token_transformer_has_a_map_of_its_patches_and_timms_embedding(name, args, prefix):
    whole = build(name, **{"img_size": 64, "depth": 2, **args}).eval()
    trunk, tail = share(whole, out_features=(whole.stages[0],))
    size = args.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = trunk.eval()(x)
        assert torch.equal(tail(tail_input(features, whole.stages[-1])), whole.model(x))
        tokens = whole.model.forward_features(x)
    assert (
        isinstance(tail, Pool) == (prefix > 0) and features[whole.stages[0]].shape == features[whole.stages[-1]].shape
    )
    assert tokens.shape[1] == prefix + features[whole.stages[-1]].shape[2:].numel()
    if isinstance(tail, Pool):  # the map has the patches in their places: the same norm turns both into timm's tokens
        patches = features[whole.stages[-1]].flatten(2).transpose(1, 2)
        torch.testing.assert_close(whole.model.norm(patches), tokens[:, prefix:])


class Strided(torch.nn.Module):
    """The least that a backbone is: maps by stage, and what they are."""

    def __init__(self, out_features=()):
        super().__init__()
        self.name, self.stages, self.out_features = "strided", ["c3"], ("c3",)
        self.feature_info = {"c3": FeatureInfo(8, 8, "conv")}
        self.conv = torch.nn.Conv2d(3, 8, 8, 8)

    def forward(self, images):
        return {"c3": self.conv(images)}


def test_a_backbone_that_is_no_timm_model_is_shared_whole():
    whole = Strided()
    trunk, tail = share(whole)
    assert trunk is not whole and set(trunk.state_dict()) == set(whole.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tail(tail_input(trunk(x), "c3")), whole.conv(x).mean(dim=(2, 3)))
    with pytest.raises(SplitError, match="'strided' has no method split.*shared_stage=null"):
        share(whole, "c3")


def test_an_unknown_stage_names_the_nearest_and_all():
    with pytest.raises(SplitError, match=r"no stage 'c44'\. Did you mean 'c4'\? Stages: c1, c2, c3, c4, c5"):
        build("test_resnet").split("c44")
    with pytest.raises(SplitError, match="no stage 'layer3'"):
        build("test_resnet", out_features=("layer3",))


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(RegistryError, match="Unknown backbone 'resnet5O'. Did you mean 'resnet50'?"):
        build("resnet5O")
    with pytest.raises(RegistryError, match="timm has no architecture 'resnet5O'. Did you mean 'resnet50'?"):
        build("timm", architecture="resnet5O")


def test_an_argument_that_timm_does_not_know_is_named():
    with pytest.raises(RegistryError, match="'test_resnet' does not take these arguments.*dropp"):
        build("test_resnet", dropp=0.1)


SWIN = pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*timm.list_models("test_*"), SWIN])
def test_any_family_splits_exactly_or_says_that_it_does_not(name):
    whole = build(name).eval()
    stage = whole.stages[len(whole.stages) // 2]
    try:
        trunk, tail = whole.split(stage)
    except SplitError as error:
        assert name in str(error) and ("Try another stage" in str(error) or "class_token=False" in str(error))
        return
    x = images(whole, batch=2)
    with torch.no_grad():
        assert torch.equal(tail.eval()(trunk.eval()(x)[stage]), whole.model(x))


def test_an_image_size_that_the_network_does_not_take_is_named_with_the_way_out():
    with pytest.raises(ConfigError, match="test_vit.*images of 98 x 96.*backbone.img_size"):
        build_backbone(name="test_vit", img_size=96, dynamic_img_size=False)(torch.zeros(1, 3, 98, 96))
