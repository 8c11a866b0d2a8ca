import pytest
import torch
from PIL import Image

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.data.views import masked_view, multi_crop, two_views
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS, build_backbone, build_pretext

METHODS = PRETEXT_METHODS.list()
#: methods that need another backbone than a small ResNet, and the stage it is split at
BACKBONES = {
    "simmim": ({"name": "test_vit", "class_token": False, "global_pool": "avg", "img_size": 32}, "blocks.5"),
}
#: views at 16 pixels, and the shapes of a sample at the paper's size, of methods that take other than two views
VIEWS = {
    "dino": (multi_crop(size=16, local_size=8), [(3, 96, 96)] * 2 + [(3, 48, 48)] * 8),
    "simmim": (masked_view(size=16, mask_patch=8), [(3, 192, 192), (6, 6)]),
}


def build(method, **kwargs):
    torch.manual_seed(0)
    arguments, stage = BACKBONES.get(method, ({"name": "test_resnet"}, "c3"))
    whole = build_backbone(**arguments)
    trunk, tail = whole.split(stage)
    kwargs = narrow_widths({"name": method}) | kwargs
    return whole, trunk, build_pretext(name=method, backbone=trunk, tail=tail, **kwargs)


def batch(method=None, size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = tuple(torch.randn(2, size, 3, 32, 32, generator=generator))
    if method == "dino":
        return *images, *torch.randn(3, size, 3, 16, 16, generator=generator)
    if method == "simmim":
        return images[0], torch.tensor([[True, False], [True, True]]).expand(size, 2, 2)
    return images


def state_of(*modules):
    return {
        f"{i}.{key}": value.clone() for i, module in enumerate(modules) for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_scalars_that_train_trunk_tail_and_head(method):
    _, trunk, pretext = build(method)
    losses = pretext.losses(trunk, batch(method))
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    trained = [*trunk.parameters(), *(p for p in pretext.parameters() if p.requires_grad)]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("method", METHODS)
def test_losses_move_nothing_but_batch_norm_statistics(method):
    _, trunk, pretext = build(method)
    before, random_state = state_of(trunk, pretext), torch.get_rng_state()
    pretext.losses(trunk, batch(method))
    changed = {key for key, value in state_of(trunk, pretext).items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running_" in key or "num_batches_tracked" in key}
    assert changed <= statistics and bool(changed) == bool(statistics)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_is_an_argument_and_never_a_member(method):
    _, trunk, pretext = build(method)
    assert not {id(p) for p in trunk.parameters()} & {id(p) for p in pretext.parameters()}
    other = build(method)[1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert pretext.losses(other, batch(method)) != pretext.losses(trunk, batch(method))


@pytest.mark.parametrize("method", METHODS)
def test_embedding_is_what_the_whole_backbone_computes(method):
    whole, trunk, pretext = build(method)
    images = batch()[0]
    for module in (whole, trunk, pretext):
        module.eval()
    with torch.no_grad():
        assert torch.equal(pretext.embed(trunk, images), whole.model(images))


@pytest.mark.parametrize("method", METHODS)
def test_views_are_those_it_was_given_or_the_papers(method):
    mine, shapes = VIEWS.get(method, (two_views(size=16), [(3, 96, 96)] * 2))
    assert build(method, augmentation=mine)[2].views() is mine
    views = build(method)[2].views()(Image.new("RGB", (120, 90)))
    assert [view.shape for view in views] == shapes


def test_a_method_of_ones_own_is_a_class_and_a_name():
    @PRETEXT_METHODS.register("constant_for_test")
    class Constant(PretextMethod):
        def losses(self, backbone, views):
            return {"constant": self.embed(backbone, views[0]).mean()}

    try:
        _, trunk, pretext = build("constant_for_test")
        assert pretext.losses(trunk, batch())["constant"].shape == ()
        assert pretext.after_step(trunk) is None
    finally:
        del PRETEXT_METHODS._obj_map["constant_for_test"]
