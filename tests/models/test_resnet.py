"""The ResNet trunk: what it adds to timm's."""

from typing import Any

import pytest
import torch
from support import randomise
from timm.models.resnet import drop_blocks
from torch import Tensor, nn

from timm_res2net.models.function import FIRST_BLOCKS
from timm_res2net.models.resnet import Res2Net
from timm_res2net.models.trunk import drop_block_layers

SHALLOW: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(8, 16, 24, 32))


@pytest.mark.parametrize(
    ('layers', 'arguments', 'params'),
    [((3, 4, 6, 3), {}, 25_557_032), ((3, 4, 6, 3), dict(stem_type='deep', stem_width=32, avg_down=True), 25_576_264)],
)
def test_resnet_scale_1_width_64_has_parameter_count_of_plain_resnet(
    layers: Any, arguments: dict[str, Any], params: int
) -> None:
    model = Res2Net(layers, scale=1, base_width=64, device='meta', **arguments)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize('function', FIRST_BLOCKS)
@pytest.mark.parametrize('avg_down', [False, True])
def test_resnet_output_stride_16_equals_undilated_on_denser_grid(function: str, avg_down: bool, images: Tensor) -> None:
    torch.manual_seed(0)
    arguments = dict(first_block=function, avg_down=avg_down, **SHALLOW)
    model = randomise(Res2Net(**arguments)).double().eval()
    dilated = Res2Net(output_stride=16, **arguments).double().eval()
    dilated.load_state_dict(model.state_dict())
    dense = dilated.forward_features(images.double())
    torch.testing.assert_close(dense[..., ::2, ::2], model.forward_features(images.double()))


@pytest.mark.parametrize('function', FIRST_BLOCKS)
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_resnet_output_stride_keeps_cascade_and_pool_of_first_blocks(function: str, output_stride: int) -> None:
    model = Res2Net(first_block=function, output_stride=output_stride, **SHALLOW)
    expected = [function == 'paddle', False, False, False]
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [stage[0].cascade for stage in stages] == expected
    assert model.layer2[1].cascade
    pools = [isinstance(stage[0].pool, nn.AvgPool2d) for stage in stages]
    assert pools == [function == 'official', *[function != 'group'] * 3]
    assert isinstance(model.layer2[1].pool, nn.Identity)


def test_first_block_functions_share_state_dict_and_differ_in_output(images: Tensor) -> None:
    torch.manual_seed(0)
    functions = ('official', 'paddle', 'mmdet')
    models = {function: Res2Net(first_block=function, **SHALLOW).eval() for function in functions}
    state = randomise(models['official']).state_dict()
    outputs = {}
    for function, model in models.items():
        model.load_state_dict(state)
        outputs[function] = model(images)
    for one, other in (('official', 'paddle'), ('official', 'mmdet'), ('paddle', 'mmdet')):
        difference = (outputs[one] - outputs[other]).norm() / outputs[one].norm()
        assert difference > 0.01, (one, other)


@pytest.mark.parametrize('output_stride', [4, 64, 12])
def test_resnet_unsupported_output_stride_raises_value_error(output_stride: int) -> None:
    with pytest.raises(ValueError, match=f'output_stride={output_stride}'):
        Res2Net(output_stride=output_stride, **SHALLOW)


def test_dilate_pool_replaces_avg_pool_2d_same_of_dilated_shortcuts() -> None:
    """Fails when timm pools there by another module, which `dilate_shortcut_pools` would not find."""

    def kinds(model: nn.Module) -> list[str]:
        return [type(model.get_submodule(f'layer{i}.0.downsample.0')).__name__ for i in (2, 3, 4)]

    arguments = dict(avg_down=True, output_stride=8, **SHALLOW)
    assert kinds(Res2Net(**arguments)) == ['AvgPool2d', 'AvgPool2dSame', 'AvgPool2dSame']
    assert kinds(Res2Net(dilate_pool=True, **arguments)) == ['AvgPool2d', 'DilatedAvgPool2d', 'DilatedAvgPool2d']


def test_drop_block_layers_equal_those_of_timm() -> None:
    def settings(rate: float, make: Any) -> list[Any]:
        layers = [each and each() for each in make(rate)]
        return [layer and (layer.drop_prob, layer.block_size, layer.gamma_scale) for layer in layers]

    for rate in (0.0, 0.1):
        assert settings(rate, drop_block_layers) == settings(rate, drop_blocks)


@pytest.mark.parametrize('function', FIRST_BLOCKS)
def test_resnet_explicit_dilation_without_first_block_equals_timms_output_stride(function: str, images: Tensor) -> None:
    arguments = dict(first_block=function, drop_path_rate=0.1, drop_block_rate=0.1, **SHALLOW)
    torch.manual_seed(0)
    dilated = randomise(Res2Net(output_stride=16, **arguments)).eval()
    explicit = Res2Net(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), dilate_first=False, **arguments).eval()
    explicit.load_state_dict(dilated.state_dict())
    torch.testing.assert_close(explicit(images), dilated(images), rtol=0, atol=0)
    assert explicit.feature_info == dilated.feature_info
    rates = [[getattr(block.drop_path, 'drop_prob', 0) for block in model.layer2] for model in (explicit, dilated)]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[1] != [0, 0]
    kinds = [type(model.layer4[0].drop_block).__name__ for model in (explicit, dilated)]
    assert kinds == ['DropBlock2d'] * 2


def test_resnet_explicit_geometry_dilates_first_blocks_and_pools_by_strides() -> None:
    model = Res2Net(strides=(1, 2, 1, 2), dilations=(1, 1, 2, 4), first_block='mmdet', avg_down=True, **SHALLOW)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [stage[0].convs[0].stride[0] for stage in stages] == [1, 2, 1, 2]
    assert [stage[0].convs[0].dilation[0] for stage in stages] == [1, 1, 2, 4]
    assert [type(stage[0].pool).__name__ for stage in stages] == ['Identity', 'AvgPool2d', 'Identity', 'AvgPool2d']
    shortcuts = [type(stage[0].downsample[0]).__name__ for stage in stages]
    assert shortcuts == ['Identity', 'AvgPool2d', 'Identity', 'AvgPool2d']
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8, 8, 16]


def test_resnet_stem_ceil_mode_rounds_maps_up(images: Tensor) -> None:
    features = Res2Net(stem_ceil_mode=True, **SHALLOW).forward_intermediates(images, intermediates_only=True)
    assert [feature.shape[-1] for feature in features] == [32, 17, 9, 5, 3]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(strides=(1, 2, 2)), 'an entry for each of 4 stages'),
        (dict(strides=(1, 2, 2, 1), output_stride=16), 'leave output_stride and dilate_pool out'),
        (dict(dilations=(1, 1, 1, 2), dilate_pool=True), 'leave output_stride and dilate_pool out'),
        (dict(dilations=(1, 1, 1, 2), down_kernel_size=3), 'leave down_kernel_size out'),
        (dict(dilate_first=False), 'dilate_first=False has no effect without dilations'),
        (dict(dilations=(1, 1, 2, (4, 8))), r'dilations has 2 entries for a stage of \d blocks'),
        (dict(stem_ceil_mode=True, replace_stem_pool=True), 'stem_ceil_mode is for a stem with a plain max-pool'),
    ],
)
def test_resnet_contradicting_geometry_raises_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Res2Net(**SHALLOW, **arguments)
