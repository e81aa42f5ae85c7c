"""Fused models compute the same without norms, and stay in evaluation mode."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import TRUNKS, assert_same, built, fitting, randomize, tiny
from timm.layers import BatchNormAct2d
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models._utils import IntermediateLayerGetter

from timm_res2net import fuse
from timm_res2net.models.fold import fold_norm


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def make_segmenter() -> nn.Module:
    """A backbone with a neck and a head that have norms of their own."""
    head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return randomize(nn.Sequential(tiny(num_classes=0, global_pool=''), nn.Conv2d(32, 8, 1), head)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(built, name) for name in TRUNKS},
    **{kind: partial(tiny, features_only=True, feature_cls=kind) for kind in ('list', 'hook', 'getter')},
    'segmenter': make_segmenter,
    'layer getter': lambda: IntermediateLayerGetter(tiny(), {'layer2': '0', 'layer4': '1'}).eval(),
}


@pytest.mark.parametrize('kind', MODELS)
def test_fuse_keeps_output_changes_no_tensor_of_the_model_and_leaves_no_norm(kind: str, images: Tensor) -> None:
    model = MODELS[kind]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    assert_same(fused, model, fitting(kind, images) if kind in TRUNKS else images)
    assert count_norms(model) > 0
    assert count_norms(fused) == 0 or kind == 'getter'  # this wrapper traces the model
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', TRUNKS)
def test_fuse_full_size_model_keeps_output(name: str, images: Tensor) -> None:
    model = built(name, full=True)
    assert_same(fuse(model), model, fitting(name, images))


ALL, NONE = [True] * 4, [False] * 4


@pytest.mark.parametrize(
    ('first_block', 'arguments', 'merged'),
    [
        ('official', {}, ALL),
        ('official', dict(scale=2), ALL),  # has only one convolution even before fusing
        ('official', dict(act_layer='silu'), NONE),
        ('official', dict(act_layer='relu6'), ALL),
        ('official', dict(output_stride=8), [True, True, True, False]),  # dilated convolutions, undilated pool
        ('official', dict(output_stride=8, dilate_pool=True), ALL),
        ('official', dict(norm_layer='groupnorm1'), NONE),
        ('official', dict(norm_layer='frozenbatchnorm2d'), ALL),
        ('official', dict(cardinality=2, base_width=16, attn_layer='se'), ALL),
        ('official', dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1), ALL),
        ('paddle', {}, NONE),
        ('mmdet', {}, ALL),
        ('mmdet', dict(act_layer='silu'), NONE),
        ('group', dict(act_layer='silu', output_stride=8), ALL),
    ],
    ids=str,
)
def test_fuse_keeps_output_and_merges_first_blocks_into_one_convolution_where_exact(
    first_block: str, arguments: dict[str, Any], merged: list[bool], images: Tensor
) -> None:
    model = tiny(first_block, channels=(8, 16, 8, 16), **arguments)
    for fused in (fuse(model), reparameterize_model(model)):
        assert_same(fused, model, images[:, :, :33, :40])
        assert [len(fused.get_submodule(f'layer{i}.0.convs')) == 1 for i in range(1, 5)] == merged


def test_reparameterize_model_keeps_norms_of_stem_even_in_training_mode(images: Tensor) -> None:
    model = tiny()
    fused = reparameterize_model(tiny().train()).eval()  # the order of timm's scripts, and of timmx
    assert_same(fused, model, images)
    assert count_norms(fused) == 3


def test_fuse_twice_changes_nothing(images: Tensor) -> None:
    fused = fuse(tiny())
    assert_same(fuse(fused), fused, images, tolerance=0)


def test_fuse_keeps_forward_intermediates(images: Tensor) -> None:
    model: Any = tiny()
    features, expected = (each.forward_intermediates(images, intermediates_only=True) for each in (fuse(model), model))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('convert', [torch.jit.script, torch.fx.symbolic_trace])  # test_export.py exports one
def test_fused_model_scripted_or_traced_keeps_output(convert: Callable[[nn.Module], nn.Module], images: Tensor) -> None:
    model = tiny()
    assert_same(convert(fuse(model)), model, images)


@pytest.mark.parametrize(
    'make',
    [
        lambda: fuse(tiny()),
        lambda: copy.deepcopy(fuse(nn.Sequential(nn.Dropout(), tiny()).eval())),  # contains a module of torch
        lambda: tiny().layer2[1].fuse(),
        lambda: reparameterize_model(tiny()),
        lambda: reparameterize_model(tiny(features_only=True)),
    ],
    ids=['model', 'copied wrapper', 'block', 'reparameterized', 'features'],
)
def test_fused_model_stays_in_evaluation_mode(make: Callable[[], nn.Module]) -> None:
    assert not any(module.training for module in make().train().modules())


@pytest.mark.parametrize(
    ('make', 'message'),
    [(lambda: tiny().train(), r'training mode.*eval'), (lambda: nn.Identity().eval(), 'no Res2Net block')],
)
def test_fuse_other_modules_or_in_training_mode_raises_value_error(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(make())


@pytest.mark.parametrize('reparametrize', [partial(prune.l1_unstructured, amount=0.3), parametrizations.weight_norm])
def test_fuse_keeps_norms_after_convolutions_whose_weight_is_computed(
    reparametrize: Callable[..., Any], images: Tensor
) -> None:
    model = tiny()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            reparametrize(module, name='weight')
    with torch.no_grad():
        model.eval()(images)  # torch cannot copy some of these models before their first run without gradients
    assert_same(fuse(model), model, images)


def test_fold_norm_keeps_a_norm_with_an_activation() -> None:
    norm = BatchNormAct2d(4).eval()
    assert fold_norm(nn.Conv2d(3, 4, 1), norm) is norm
