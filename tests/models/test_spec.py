"""A spec holds everything about a network's function that its tensors' names and shapes do not show."""

import json
import re
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from support import TRUNKS, small, tiny
from timm.layers import CecaModule, EcaModule, create_attn, get_act_layer
from torch import nn

from timm_res2net import fuse
from timm_res2net.models.block import spec_of
from timm_res2net.models.spec import (
    ARGUMENTS,
    FIRST_BLOCKS,
    HIDDEN_ATTENTION,
    NetworkSpec,
    activation_name,
    hidden_attention,
)
from timm_res2net.models.trunk import TrunkOptions
from timm_res2net.models.variants import ARCHS

# fmt: off
GEOMETRY: dict[str, Any] = dict(
    style='caffe', strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), dilate_first=False,
    deformable=(None, None, 'v1', 'v2'), stem_ceil_mode=True,
)
# fmt: on


def test_spec_of_a_model_has_the_arguments_that_made_it() -> None:
    given: dict[str, Any] = dict(GEOMETRY, first_block='mmdet', act_layer='silu', norm_eps=1e-3, attn_layer='ceca')
    spec = NetworkSpec(**given)
    assert {*spec.differing_fields(NetworkSpec())} == {*vars(spec)} - {'shortcut_root'}  # so every field is tested
    model = tiny(**given)
    for each in (model, fuse(model), tiny(**given, features_only=True), nn.DataParallel(model)):
        assert spec_of(each) == spec
    assert spec_of(nn.Linear(2, 2)) is None
    dla = timm.create_model('dla60_res2net', shortcut_root=True, device='meta', **small('dla60_res2net'))
    assert spec_of(dla) == NetworkSpec(shortcut_root=True) == NetworkSpec.from_arguments(dict(shortcut_root=True))


def test_blocks_without_splits_have_the_same_spec_whatever_their_first_block() -> None:
    specs = [spec_of(timm.create_model('resnext29_8c_64w', device='meta', first_block=kind)) for kind in FIRST_BLOCKS]
    assert specs == [NetworkSpec()] * len(FIRST_BLOCKS)


@pytest.mark.parametrize('name', TRUNKS)
def test_spec_of_every_trunk_has_activation_and_eps(name: str) -> None:
    model = timm.create_model(name, device='meta', act_layer=nn.LeakyReLU, norm_eps=1e-3, **small(name))
    spec = spec_of(model)
    assert spec is not None
    assert (spec.act_layer, spec.norm_eps) == ('leaky_relu', 1e-3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    assert spec_of(timm.create_model(name, device='meta', norm_layer=norm_layer, **small(name))).norm_eps == 1e-3


@pytest.mark.parametrize('name', [name for name in TRUNKS if name != 'test_res2net'])
def test_geometry_argument_of_a_trunk_with_fixed_geometry_raises_value_error(name: str) -> None:
    for field, value in GEOMETRY.items():
        with pytest.raises(ValueError, match=f'{name} does not support {field}: the geometry of Res2Net.* is fixed'):
            timm.create_model(name, device='meta', **{field: value})


def test_output_stride_is_not_part_of_the_spec_but_strides_are() -> None:
    channels = (8, 16, 24, 32)  # with equal channels, timm makes no projection in a dilated stage
    plain, dilated = (tiny(channels=channels, output_stride=stride) for stride in (32, 8))
    assert spec_of(dilated) == spec_of(plain)
    assert [stage[0].cascade for stage in (dilated.layer3, dilated.layer4)] == [False, False]
    assert plain.state_dict().keys() == dilated.state_dict().keys()
    assert tiny(output_stride=8).layer3[0].cascade
    assert spec_of(tiny(dilations=[1, [2, 2], 1, [4]])) == NetworkSpec(dilations=(1, 2, 1, 4))


def test_spec_as_text_reads_back_equal() -> None:
    other = dict(dilations=(1, 1, 2, (4, 8)), norm_eps=0.0, attn_layer='ceca', shortcut_root=True)
    spec = NetworkSpec(**{**GEOMETRY, **other})
    text = spec.as_text()
    assert all(isinstance(value, str) for value in text.values())
    assert NetworkSpec.from_text({**text, 'format': 'pt'}) == spec
    assert NetworkSpec().as_text() == {'first_block': 'official'}
    assert json.loads(text['dilations']) == [1, 1, 2, [4, 8]]


@pytest.mark.parametrize(
    'name', ['silu', 'relu', 'relu6', 'leaky_relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'hard_mish', 'hardswish']
)
def test_activation_name_is_timms_and_shows_arguments_of_a_partial(name: str) -> None:
    layer = get_act_layer(name)
    assert activation_name(layer) == activation_name(partial(layer, inplace=True)) == name
    assert activation_name(partial(layer, 0.3, alpha=1)) == f'{name}(0.3, alpha=1)'


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(first_block='caffe'), "first_block='caffe' is not known: choose from 'official', 'paddle'"),
        (dict(style='keras'), "style='keras' is not known: choose from 'pytorch', 'caffe'"),
        (dict(strides=(1, 2, 2)), r'strides=(1, 2, 2) must have an entry for each of 4 stages'),
        (dict(strides=(1, 2, 2, 0)), 'must be positive integers'),
        (dict(dilations=(1, 1, 1, (1, '2'))), 'must be positive integers'),
        (dict(deformable=(None, None, None, 'v3')), "deformable='v3' is not known: choose from None, 'v1', 'v2'"),
        (dict(dilate_first=False), 'dilate_first=False has no effect without dilations'),
        (dict(shortcut_root=1), 'shortcut_root=1 must be True or False'),
        (dict(attn_layer='se'), "attn_layer='se' is not known: choose from None, 'ceca'"),
        (dict(act_layer=nn.ReLU), 'must be the name of an activation'),
        (dict(norm_eps=-1), 'norm_eps=-1 must be a number from 0 to 1'),
    ],
)
def test_invalid_spec_raises_value_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NetworkSpec(**fields)


@pytest.mark.parametrize(
    ('layer', 'eps'),
    [
        ('batchnorm2d', 1e-5),
        ('layernorm2d', 1e-6),
        (partial(nn.BatchNorm2d, eps=1e-2), 1e-2),
        (nn.Identity, NetworkSpec.norm_eps),
    ],
)
def test_arguments_with_a_norm_have_its_eps(layer: Any, eps: float) -> None:
    assert NetworkSpec.from_arguments(dict(norm_layer=layer)).norm_eps == eps
    assert NetworkSpec.from_arguments(dict(norm_layer=layer, norm_eps=1e-4)).norm_eps == 1e-4


@pytest.mark.parametrize('layer', [5, [1], '', 'warp', torch.zeros(2)], ids=repr)
@pytest.mark.parametrize(('field', 'kind'), [('norm_layer', 'norm'), ('act_layer', 'activation')])
def test_layer_of_another_kind_raises_value_error(field: str, kind: str, layer: object) -> None:
    with pytest.raises(ValueError, match=f'{field}=.* is not a timm {kind}'):
        NetworkSpec.from_arguments({field: layer})


@pytest.mark.parametrize('depth', [900, 100_000])
@pytest.mark.parametrize('field', ['dilations', 'norm_eps'])
def test_metadata_nested_deeply_raises_value_error(field: str, depth: int) -> None:
    for nested in ('[' * depth + ']' * depth, '[' * depth):
        with pytest.raises(ValueError, match=r'must be|must have|nested|Expecting'):
            NetworkSpec.from_text({field: nested})


# Arguments, by their effect

ATTENTION = 'se', 'ese', 'eca', 'ecam', 'ceca', 'gc', 'gca', 'cbam', 'lcbam', 'coord', 'scoord', 'ela', 'strip'


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_hidden_attention_has_the_tensors_of_another_kind() -> None:
    first: dict[str, str] = {}
    hidden = [name for name in ATTENTION if first.setdefault(str(shapes(create_attn(name, 64))), name) != name]
    assert tuple(hidden) == HIDDEN_ATTENTION
    assert hidden_attention(partial(CecaModule, beta=2)) == hidden_attention('CECA') == 'ceca'
    assert NetworkSpec.from_arguments(dict(attn_layer='ceca')) == NetworkSpec(attn_layer='ceca')
    assert hidden_attention(EcaModule) is hidden_attention('se') is hidden_attention(None) is None


def test_every_argument_of_every_trunk_is_of_exactly_one_kind() -> None:
    arguments = set().union(*(ARCHS[name].trunk.arguments() for name in TRUNKS))
    assert sorted(argument for kind in ARGUMENTS.values() for argument in kind) == sorted(arguments)


# fmt: off
CHANGES: dict[str, dict[str, Any]] = {
    'spec': dict(
        first_block='mmdet', style='caffe', strides=(1, 2, 2, 1), dilations=(1, 1, 2, 2), stem_ceil_mode=True,
        shortcut_root=True, act_layer='silu', norm_eps=0.1, attn_layer='ceca',
    ),
    'tensors': dict(
        scale=3, base_width=40, cardinality=2, norm_layer='groupnorm1', alpha=4, beta=1, stem_width=16,
        stem_type='deep_tiered', replace_stem_pool=True, avg_down=False, in_chans=1, num_classes=3,
    ),
    'use': dict(output_stride=16, dilate_pool=True, global_pool='max'),
    'training': dict(drop_rate=0.5, drop_path_rate=0.5, drop_block_rate=0.5, zero_init_last=False),
}
# fmt: on
COMMON = {*vars(TrunkOptions()), 'output_stride'}  # one trunk is enough to test these


@cache
def eca_model(name: str, **arguments: Any) -> nn.Module:
    base = dict(device='meta', attn_layer='eca', first_block='official', **small(name))
    return timm.create_model(name, **{**base, **arguments})


@pytest.mark.parametrize(
    ('name', 'kind', 'argument'),
    [
        (name, kind, argument)
        for name in TRUNKS
        for kind, changes in CHANGES.items()
        for argument in changes
        if argument in ARCHS[name].trunk.arguments() and (name == 'test_res2net' or argument not in COMMON)
    ],
)
def test_argument_has_the_effect_of_its_kind(name: str, kind: str, argument: str) -> None:
    plain, changed = eca_model(name), eca_model(name, **{argument: CHANGES[kind][argument]})
    assert argument in ARGUMENTS[kind]
    assert (shapes(changed) == shapes(plain)) == (kind != 'tensors')
    assert (spec_of(changed) == spec_of(plain)) == (kind != 'spec')
