"""Feature maps at every stride: dilated networks compute what undilated ones do. Frozen norms."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support import randomize, small, tiny
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from timm_res2net.models.variants import ARCHS


def exact(name: str, output_stride: int) -> dict[str, Any]:
    """Arguments for a dilated network that computes exactly what the undilated one does."""
    return {**ARCHS[name].trunk.densest, 'output_stride': output_stride}


@pytest.mark.parametrize(
    ('name', 'output_stride', 'arguments'),
    [
        ('res2net50_26w_4s', 8, {}),
        ('res2net50_26w_4s', 8, dict(first_block='mmdet', style='caffe')),
        ('res2net50d', 8, dict(first_block='paddle')),
        ('res2net50d', 16, dict(first_block='mmdet')),
        ('res2net50d', 16, dict(style='caffe')),
        ('dla60_res2net', 8, dict(first_block='paddle')),
        ('blres2net50_26w_4s', 16, dict(first_block='paddle')),
        ('res2next29_6c_24w_4s', 1, {}),
    ],
    ids=str,
)
def test_dilated_network_computes_the_undilated_one_on_a_denser_grid(
    name: str, output_stride: int, arguments: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    options = dict(dtype=torch.float64, **arguments, **small(name))
    plain = randomize(timm.create_model(name, **options)).eval()
    dilated = timm.create_model(name, **options, **exact(name, output_stride)).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 88, 64, dtype=torch.float64)  # 11 rows at stride 8: the last window of a pool is cut
    if name.startswith('res2next29'):
        x = x[..., :24, :16]
    wanted, dense = (model.forward_intermediates(x, intermediates_only=True) for model in (plain, dilated))
    for ours, theirs, info in zip(dense, wanted, plain.feature_info):
        step = max(1, info['reduction'] // output_stride)
        torch.testing.assert_close(ours[..., ::step, ::step], theirs)


def test_output_stride_none_is_the_default() -> None:
    make: Any = timm.models.model_entrypoint('test_res2net')  # timm.create_model drops None
    assert make(output_stride=None, features_only=True).feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize('name', ['test_res2net', 'res2next29_6c_24w_4s'])
def test_out_indices_beyond_feature_count_raise_value_error(name: str) -> None:
    count = ARCHS[name].out_indices[-1] + 1
    for indices in ((0, count), (-count - 1,), count + 1):
        with pytest.raises(ValueError, match=f'has {count} features, 0 to {count - 1} or, .*, -{count} to -1'):
            timm.create_model(name, features_only=True, out_indices=indices, device='meta', **small(name))
    taken: Any = ((0, count - 1), 2), ((-count, -1), 2), (np.array([0, 1]), 2), (2, 2), (count, count)
    for indices, number in taken:
        model = timm.create_model(name, features_only=True, out_indices=indices, device='meta', **small(name))
        assert len(model.feature_info.channels()) == number


def test_feature_cfg_takes_the_arguments_of_features_only() -> None:
    model = timm.create_model(
        'test_res2net', features_only=True, feature_cfg=dict(feature_cls='dict', out_indices=(1,))
    )
    assert type(model).__name__ == 'FeatureDict'
    assert model.feature_info.channels() == [32]
    for refused, error in ((dict(out_indices=(9,)), ValueError), (dict(unknown=1), TypeError)):
        with pytest.raises(error, match=next(iter(refused))):
            timm.create_model('test_res2net', features_only=True, feature_cfg=refused)
    assert timm.create_model('test_res2net', feature_cfg=dict(out_indices=(1,)), device='meta').num_classes == 10


@pytest.mark.parametrize('norm_layer', [FrozenBatchNorm2d, partial(FrozenBatchNormAct2d, apply_act=False)])
def test_frozen_norms_load_batch_norm_weights_and_have_no_parameters(norm_layer: Any, images: Tensor) -> None:
    plain, frozen = tiny().double(), tiny(norm_layer=norm_layer).double()
    assert frozen.load_state_dict(plain.state_dict(), strict=False).missing_keys == []
    torch.testing.assert_close(frozen(images.double()), plain(images.double()))
    assert all('bn' not in key for key, _ in frozen.named_parameters())
