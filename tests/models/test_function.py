"""A network's function holds all that its tensors' names and shapes don't tell."""

import json
import re
from functools import partial
from typing import Any

import pytest
import timm
import torch
from support import TRUNKS, small, tiny
from timm.layers import get_act_layer
from torch import nn

from timm_res2net import fuse
from timm_res2net.models.block import function_of
from timm_res2net.models.function import Function, activation_name

GEOMETRY: dict[str, Any] = dict(
    style='caffe',
    strides=(1, 2, 1, 1),
    dilations=(1, 1, 2, 4),
    dilate_first=False,
    deformable=(None, None, 'v1', 'v2'),
    stem_ceil_mode=True,
)


def test_function_of_model_is_what_it_was_made_with() -> None:
    stated: dict[str, Any] = dict(GEOMETRY, first_block='mmdet', act_layer='silu', norm_eps=1e-3)
    function = Function(**stated)
    assert sorted(function.differing_fields(Function())) == sorted(vars(function))  # so each is tested
    model = tiny(**stated)
    for each in (model, fuse(model), tiny(**stated, features_only=True), nn.DataParallel(model)):
        assert function_of(each) == function
    assert function_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize('name', TRUNKS)
def test_function_of_every_trunk_has_activation_and_eps(name: str) -> None:
    model = timm.create_model(name, device='meta', act_layer=nn.LeakyReLU, norm_eps=1e-3, **small(name))
    function = function_of(model)
    assert function is not None
    assert (function.act_layer, function.norm_eps) == ('leaky_relu', 1e-3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    norm_layer = partial(nn.BatchNorm2d, eps=1e-3)
    assert function_of(timm.create_model(name, device='meta', norm_layer=norm_layer, **small(name))).norm_eps == 1e-3


@pytest.mark.parametrize('name', [name for name in TRUNKS if name != 'test_res2net'])
@pytest.mark.parametrize('field', GEOMETRY)
def test_geometry_of_a_trunk_that_has_one_only_raises_value_error(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f'{name} has no {field}: its Res2Net.* has one geometry only'):
        timm.create_model(name, device='meta', **{field: GEOMETRY[field]})


def test_output_stride_is_not_part_of_the_function_but_strides_are() -> None:
    channels = (8, 16, 24, 32)  # with equal ones timm makes no shortcut in a dilated stage
    plain, dilated = (tiny(channels=channels, output_stride=stride) for stride in (32, 8))
    assert function_of(dilated) == function_of(plain)
    assert [stage[0].cascade for stage in (dilated.layer3, dilated.layer4)] == [False, False]
    assert plain.state_dict().keys() == dilated.state_dict().keys()
    assert tiny(output_stride=8).layer3[0].cascade
    assert function_of(tiny(dilations=[1, [2, 2], 1, [4]])) == Function(dilations=(1, 2, 1, 4))


def test_first_block_makes_no_difference_without_splits() -> None:
    assert function_of(tiny('mmdet', scale=1)) == function_of(tiny('official', scale=1))


def test_function_as_text_reads_back_equal() -> None:
    function = Function(**{**GEOMETRY, 'dilations': (1, 1, 2, (4, 8)), 'norm_eps': 0.0})
    text = function.as_text()
    assert all(isinstance(value, str) for value in text.values())
    assert Function.from_text({**text, 'format': 'pt'}) == function
    assert Function().as_text() == {'first_block': 'official'}
    assert json.loads(text['dilations']) == [1, 1, 2, [4, 8]]


@pytest.mark.parametrize(
    'name', ['silu', 'relu', 'relu6', 'leaky_relu', 'gelu', 'gelu_tanh', 'quick_gelu', 'hard_mish', 'hardswish']
)
def test_activation_name_is_timms(name: str) -> None:
    layer = get_act_layer(name)
    assert activation_name(layer) == name
    assert activation_name(partial(layer)) == activation_name(partial(layer, inplace=True)) == name


def test_activation_name_of_a_partial_has_its_arguments() -> None:
    assert activation_name(partial(nn.LeakyReLU, negative_slope=0.3)) == 'leaky_relu(negative_slope=0.3)'
    assert activation_name(partial(nn.LeakyReLU, 0.3, inplace=True)) == 'leaky_relu(0.3)'
    function = function_of(tiny(act_layer=partial(nn.LeakyReLU, negative_slope=0.3)))
    assert function.differing_fields(function_of(tiny(act_layer=nn.LeakyReLU))) == ['act_layer']


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(first_block='caffe'), "first_block='caffe' is not known; choose from official"),
        (dict(style='keras'), "style='keras' is not known; choose from pytorch, caffe"),
        (dict(strides=(1, 2, 2)), r'strides=(1, 2, 2) must have an entry for each of 4 stages'),
        (dict(strides=(1, 2, 2, 0)), 'must be positive integers'),
        (dict(dilations=(1, 1, 1, (1, '2'))), 'must be positive integers'),
        (dict(dilations=(1, 1, 1, True)), 'must be positive integers'),
        (dict(deformable=(None, None, None, 'v3')), "deformable='v3' is not known; choose from None, v1, v2"),
        (dict(dilate_first=False), 'dilate_first=False has no effect without dilations'),
        (dict(dilate_first=torch.zeros(2)), 'must be True or False'),
        (dict(stem_ceil_mode='yes'), "stem_ceil_mode='yes' must be True or False"),
        (dict(act_layer=nn.ReLU), 'must be the name of an activation'),
        (dict(norm_eps=-1), 'norm_eps=-1 must be a number from 0 to 1'),
        (dict(norm_eps=torch.zeros(2)), 'must be a number'),
        (dict(strides=2), 'must have an entry for each of 4 stages'),
    ],
)
def test_function_that_is_not_possible_raises_value_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Function(**fields)


@pytest.mark.parametrize(
    ('layer', 'eps'),
    [
        ('batchnorm2d', 1e-5),
        ('layernorm2d', 1e-6),
        (partial(nn.BatchNorm2d, eps=1e-2), 1e-2),
        (nn.Identity, Function.norm_eps),
    ],
)
def test_arguments_with_a_norm_mean_its_eps(layer: Any, eps: float) -> None:
    assert Function.from_arguments(dict(norm_layer=layer)).norm_eps == eps
    assert Function.from_arguments(dict(norm_layer=layer, norm_eps=1e-4)).norm_eps == 1e-4


@pytest.mark.parametrize('layer', [5, [1], '', 'warp', torch.zeros(2)], ids=repr)
def test_arguments_with_what_is_no_norm_raise_value_error(layer: object) -> None:
    with pytest.raises(ValueError, match=r'norm_layer=.* is no norm of timm'):
        Function.from_arguments(dict(norm_layer=layer))


@pytest.mark.parametrize('layer', [5, True, [1], {'a': 1}, '', 'warp', torch.zeros(2)], ids=repr)
def test_arguments_with_what_is_no_activation_raise_value_error(layer: object) -> None:
    with pytest.raises(ValueError, match=r'act_layer=.* is no activation of timm'):
        Function.from_arguments(dict(act_layer=layer))
