"""Fused models compute the same without norms, and stay in evaluation mode."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from support import TRUNKS, assert_same, built, fitting, randomise, slow_but, small, tiny
from timm.layers import BatchNormAct2d
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.models._utils import IntermediateLayerGetter

from timm_res2net import fuse
from timm_res2net.models.fold import fold_norm
from timm_res2net.models.variants import ARCHS


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


FULL = [pytest.param(name, True, marks=pytest.mark.slow) for name in TRUNKS]


@pytest.mark.parametrize(('name', 'full'), [*((name, False) for name in ARCHS), *FULL])
def test_fuse_every_model_leaves_no_norm(
    name: str, full: bool, build: Callable[..., nn.Module], images: Tensor
) -> None:
    model, images = build(name, full), fitting(name, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    assert_same(fused, model, images)
    assert (count_norms(fused), count_norms(model) > 0) == (0, True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# Whether the convolutions of a first block merge depends on its function and on these arguments.
MERGING: list[dict[str, Any]] = [
    *({}, dict(scale=1), dict(scale=2), dict(act_layer='silu')),
    *(dict(output_stride=8), dict(output_stride=8, dilate_pool=True)),
]


@pytest.mark.parametrize(
    'arguments',
    [
        *(dict(first_block=kind, **more) for kind in ('official', 'paddle', 'mmdet', 'group') for more in MERGING),
        dict(cardinality=2, base_width=16),
        dict(attn_layer='se'),
        dict(act_layer='relu6'),
        dict(act_layer='leaky_relu'),
        dict(norm_layer='groupnorm1'),
        dict(norm_layer='frozenbatchnorm2d'),
        dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1),
    ],
    ids=str,
)
def test_fuse_every_block_function_and_argument_keeps_output(arguments: dict[str, Any], images: Tensor) -> None:
    model = tiny(**arguments)
    for fused in (fuse(model), reparameterize_model(model)):
        assert_same(fused, model, images[:, :, :33, :40])


@pytest.mark.parametrize(
    ('first_block', 'arguments', 'expected'),
    [
        ('official', {}, [True, True, True, True]),
        ('official', dict(scale=2), [True, True, True, True]),  # has only one convolution even before fusing
        ('official', dict(act_layer='silu'), [False, False, False, False]),
        ('official', dict(output_stride=8), [True, True, True, False]),  # dilated convolutions, undilated pool
        ('official', dict(output_stride=8, dilate_pool=True), [True, True, True, True]),
        ('official', dict(norm_layer='groupnorm1'), [False, False, False, False]),
        ('paddle', {}, [False, False, False, False]),
        ('mmdet', {}, [True, True, True, True]),
        ('group', dict(act_layer='silu'), [True, True, True, True]),
    ],
    ids=str,
)
def test_fuse_merges_first_blocks_into_one_convolution_where_exact(
    first_block: str, arguments: dict[str, Any], expected: list[bool]
) -> None:
    model = tiny(first_block, channels=(8, 16, 8, 16), **arguments)
    for fused in (fuse(model), reparameterize_model(model)):
        assert [len(fused.get_submodule(f'layer{i}.0.convs')) == 1 for i in range(1, 5)] == expected


def test_reparameterize_model_keeps_norms_of_stem_even_in_training_mode(images: Tensor) -> None:
    model = tiny()
    fused = reparameterize_model(tiny().train()).eval()  # the order of timm's scripts, and of timmx
    assert_same(fused, model, images)
    assert count_norms(fused) == 3


def test_fuse_twice_changes_nothing(images: Tensor) -> None:
    fused = fuse(tiny())
    assert_same(fuse(fused), fused, images, tolerance=0)


def make_segmenter() -> nn.Module:
    """A backbone with a neck and a head that have norms of their own."""
    head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    return randomise(nn.Sequential(tiny(num_classes=0, global_pool=''), nn.Conv2d(32, 8, 1), head)).eval()


def make_features(name: str, feature_cls: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, features_only=True, feature_cls=feature_cls, **small(name))).eval()


FEATURES = {name: partial(make_features, name, 'list') for name in TRUNKS}
WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: partial(make_features, 'test_res2net', kind) for kind in ('dict', 'hook', 'getter')},
    'segmenter': make_segmenter,
    'layer getter': lambda: IntermediateLayerGetter(tiny(), {'layer2': '0', 'layer4': '1'}).eval(),
    'dropout': lambda: nn.Sequential(nn.Dropout(), tiny()).eval(),
}


@pytest.mark.parametrize('kind', [*FEATURES, *WRAPPERS])
def test_fuse_features_and_models_around_a_backbone_keep_output_and_leave_no_norm(kind: str, images: Tensor) -> None:
    model = {**FEATURES, **WRAPPERS}[kind]()
    fused = fuse(model)
    assert_same(fused, model, fitting(kind, images) if kind in FEATURES else images)
    assert count_norms(fused) == 0 or kind == 'getter'  # this wrapper traces the model


def test_fuse_keeps_forward_intermediates(images: Tensor) -> None:
    model: Any = tiny()
    features, expected = (each.forward_intermediates(images, intermediates_only=True) for each in (fuse(model), model))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('first_block', slow_but(['official'], ['official', 'paddle']))
def test_fused_model_scripted_exported_or_traced_keeps_output(first_block: str, images: Tensor) -> None:
    model = tiny(first_block)
    fused = fuse(model)
    assert_same(torch.jit.script(fused), model, images)
    assert_same(torch.export.export(fused, (images,)).module(), model, images)
    assert_same(torch.fx.symbolic_trace(fused), model, images)


@pytest.mark.parametrize('fold', [fuse, reparameterize_model, lambda model: copy.deepcopy(fuse(model))])
@pytest.mark.parametrize('kind', [*TRUNKS, 'dict', 'hook', 'getter'])
def test_fused_model_stays_in_evaluation_mode(kind: str, fold: Callable[[nn.Module], nn.Module]) -> None:
    model = fold(WRAPPERS[kind]() if kind in WRAPPERS else built(kind))
    assert not any(module.training for module in model.train().modules())


def test_fused_block_and_wrapper_stay_in_evaluation_mode() -> None:
    for model in (tiny().layer2[1].fuse(), fuse(WRAPPERS['dropout']())):
        assert not any(module.training for module in model.train().modules())


@pytest.mark.parametrize('part', ['', 'layer3.0.bn1'])
def test_fuse_model_or_part_in_training_mode_raises_value_error(part: str) -> None:
    model = tiny()
    model.get_submodule(part).train()
    with pytest.raises(ValueError, match=r'training mode.*eval'):
        fuse(model)


def test_fuse_model_without_res2net_block_raises_value_error() -> None:
    with pytest.raises(ValueError, match='no Res2Net block'):
        fuse(timm.create_model('resnet18').eval())


@pytest.mark.parametrize(
    'reparametrize',
    [
        partial(prune.l1_unstructured, name='weight', amount=0.3),
        weight_norm,
        parametrizations.weight_norm,
        spectral_norm,
        parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
def test_fuse_keeps_norms_after_convolutions_whose_weight_is_computed(
    reparametrize: Callable[[nn.Module], Any], images: Tensor
) -> None:
    model = tiny()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            reparametrize(module)
    with torch.no_grad():
        model.eval()(images)  # torch cannot copy some of these models before their first run without gradients
    assert_same(fuse(model), model, images)


def test_fold_norm_keeps_a_norm_with_an_activation() -> None:
    norm = BatchNormAct2d(4).eval()
    assert fold_norm(nn.Conv2d(3, 4, 1), norm) is norm
