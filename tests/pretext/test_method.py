import pytest
import torch
from PIL import Image
from pretext_methods import MASKED, VIT, batch_of_views, build_method

from bissl_zoo.data.views import masked_view, multi_crop, two_views
from bissl_zoo.registry import PRETEXT_METHODS, build_backbone

METHODS = PRETEXT_METHODS.list()
#: views at 16 pixels, and the shapes of a sample at the paper's size, of methods that take other than two views
VIEWS = {
    "dino": (multi_crop(size=16, local_size=8), [(3, 96, 96)] * 2 + [(3, 48, 48)] * 8),
    "mae": (masked_view(size=16, mask_patch=8), [(3, 224, 224), (14, 14)]),
    "simmim": (masked_view(size=16, mask_patch=8), [(3, 192, 192), (6, 6)]),
}


def state_of(*modules):
    return {
        f"{i}.{key}": value.clone() for i, module in enumerate(modules) for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_scalars_that_train_trunk_tail_and_head(method):
    trunk, pretext = build_method(method)
    losses = pretext.losses(trunk, batch_of_views(method))
    assert all(loss.shape == () and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    trained = [*trunk.parameters(), *(p for p in pretext.parameters() if p.requires_grad)]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("method", METHODS)
def test_losses_move_nothing_but_batch_norm_statistics(method):
    trunk, pretext = build_method(method)
    before, random_state = state_of(trunk, pretext), torch.get_rng_state()
    pretext.losses(trunk, batch_of_views(method))
    changed = {key for key, value in state_of(trunk, pretext).items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running_" in key or "num_batches_tracked" in key}
    assert changed <= statistics and bool(changed) == bool(statistics)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("method", METHODS)
def test_the_backbone_is_an_argument_and_never_a_member(method):
    trunk, pretext = build_method(method)
    assert not {id(p) for p in trunk.parameters()} & {id(p) for p in pretext.parameters()}
    other, _ = build_method(method)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert pretext.losses(other, batch_of_views(method)) != pretext.losses(trunk, batch_of_views(method))


@pytest.mark.parametrize("method", METHODS)
def test_embedding_is_what_the_whole_backbone_computes(method):
    trunk, pretext = build_method(method)
    torch.manual_seed(0)
    whole = build_backbone(**(VIT if method in MASKED else {"name": "test_resnet"}))
    images = batch_of_views(method)[0]
    for module in (whole, trunk, pretext):
        module.eval()
    with torch.no_grad():
        assert torch.equal(pretext.embed(trunk, images), whole.model(images))


@pytest.mark.parametrize("method", METHODS)
def test_views_are_those_it_was_given_or_the_papers(method):
    mine, shapes = VIEWS.get(method, (two_views(size=16), [(3, 96, 96)] * 2))
    assert build_method(method, augmentation=mine)[1].views() is mine
    views = build_method(method)[1].views()(Image.new("RGB", (120, 90)))
    assert [view.shape for view in views] == shapes
