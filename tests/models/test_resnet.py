"""The ResNet trunk: its size, and the dilations and ceil mode that timm's ResNet lacks."""

from typing import Any

import torch
from support import randomize
from torch import Tensor

from timm_res2net.models.resnet import Res2Net

SHALLOW: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(8, 16, 24, 32))


def test_resnet_scale_1_width_64_has_parameter_count_of_plain_resnet() -> None:
    model = Res2Net((3, 4, 6, 3), scale=1, base_width=64, device='meta')
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_resnet_dilated_except_in_first_blocks_equals_timms_output_stride(images: Tensor) -> None:
    torch.manual_seed(0)
    dilated = randomize(Res2Net(output_stride=16, first_block='paddle', **SHALLOW)).eval()
    geometry: dict[str, Any] = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), dilate_first=False)
    explicit = Res2Net(first_block='paddle', **geometry, **SHALLOW).eval()
    explicit.load_state_dict(dilated.state_dict())
    torch.testing.assert_close(explicit(images), dilated(images), rtol=0, atol=0)
    assert explicit.feature_info == dilated.feature_info


def test_resnet_explicit_geometry_dilates_first_blocks_and_pools_by_strides() -> None:
    model = Res2Net(strides=(1, 2, 1, 2), dilations=(1, 1, 2, 4), first_block='mmdet', avg_down=True, **SHALLOW)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [stage[0].convs[0].stride[0] for stage in stages] == [1, 2, 1, 2]
    assert [stage[0].convs[0].dilation[0] for stage in stages] == [1, 1, 2, 4]
    assert [type(stage[0].pool).__name__ for stage in stages] == ['Identity', 'AvgPool2d', 'Identity', 'AvgPool2d']
    shortcuts = [type(stage[0].downsample[0]).__name__ for stage in stages]
    assert shortcuts == ['Identity', 'AvgPool2d', 'Identity', 'AvgPool2d']
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8, 8, 16]
    after_dilation = Res2Net(dilations=(1, 2, 1, 1), dilate_first=False, first_block='mmdet', **SHALLOW)
    assert after_dilation.layer3[0].pool.stride == 2


def test_resnet_explicit_geometry_keeps_shortcuts_between_equal_channels() -> None:
    arguments = {**SHALLOW, 'channels': (8, 8, 8, 8), 'device': 'meta'}
    explicit, plain = Res2Net(strides=(1, 2, 2, 1), **arguments), Res2Net(**arguments)
    assert explicit.state_dict().keys() == plain.state_dict().keys()


def test_resnet_stem_ceil_mode_rounds_maps_up(images: Tensor) -> None:
    features = Res2Net(stem_ceil_mode=True, **SHALLOW).forward_intermediates(images, intermediates_only=True)
    assert [feature.shape[-1] for feature in features] == [32, 17, 9, 5, 3]
