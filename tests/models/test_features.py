"""Feature maps at every stride: dilated networks compute what undilated ones do, under any norm."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from support import randomise, small
from timm.layers import FrozenBatchNormAct2d, GroupNorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import Tensor, nn

from timm_res2net.models.pool import DilatedAvgPool2d
from timm_res2net.models.variants import ARCHS

KINDS = (
    *('res2net50_26w_4s', 'res2next50', 'res2net50d', 'res2net50_pd_26w_4s', 'res2net50_vd_26w_4s'),
    *('dla60_res2net', 'dla60_res2next', 'blres2net50_26w_4s'),
)


def exact(name: str, output_stride: int) -> dict[str, Any]:
    """What makes a dilated network exact, beyond its stride."""
    return {**ARCHS[name].trunk.densest, 'output_stride': output_stride}


@pytest.mark.parametrize(
    ('name', 'output_stride'),
    [(name, stride) for name in KINDS for stride in (8, 16) if stride >= ARCHS[name].trunk.densest['output_stride']],
)
def test_output_stride_intermediates_equal_undilated_on_denser_grid(name: str, output_stride: int) -> None:
    torch.manual_seed(0)
    plain = randomise(timm.create_model(name, **small(name))).eval()
    dilated = timm.create_model(name, **small(name), **exact(name, output_stride)).eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 88, 64)  # 11 rows at stride 8: the last window of a pool is cut
    wanted, dense = (model.forward_intermediates(x, intermediates_only=True) for model in (plain, dilated))
    for ours, theirs, info in zip(dense, wanted, plain.feature_info):
        step = max(1, info['reduction'] // output_stride)
        torch.testing.assert_close(ours[..., ::step, ::step], theirs, rtol=1e-3, atol=1e-4)


def test_output_stride_without_dilate_pool_is_exact_at_16_for_even_sides_only() -> None:
    torch.manual_seed(0)
    plain = randomise(timm.create_model('res2net50d', **small('res2net50d'))).eval()
    for height, output_stride, is_exact in ((96, 16, True), (97, 16, False), (96, 8, False)):
        x = torch.randn(1, 3, height, 64)
        wanted = plain.forward_features(x)
        dilated = timm.create_model('res2net50d', output_stride=output_stride, **small('res2net50d')).eval()
        dilated.load_state_dict(plain.state_dict())
        step = 32 // output_stride
        difference = (dilated.forward_features(x)[..., ::step, ::step] - wanted).abs().max() / wanted.abs().max()
        assert (difference < 1e-5) == is_exact
        assert not any(isinstance(module, DilatedAvgPool2d) for module in dilated.modules())


@pytest.mark.parametrize('size', [(8, 6), (9, 7)])
def test_dilated_avg_pool_of_kernel_2_equals_strided_pool_on_denser_grid(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    strided = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    for dilation in (1, 2):
        dense = x.repeat_interleave(dilation, 2).repeat_interleave(dilation, 3)  # the grid that a dilated stage is on
        pooled = DilatedAvgPool2d(dilation, kernel_size=2, count_include_pad=False)(dense)
        torch.testing.assert_close(pooled[..., :: 2 * dilation, :: 2 * dilation], strided(x))


def test_dilate_pool_scripted_traced_or_exported_keeps_output() -> None:
    torch.manual_seed(0)
    model = randomise(
        timm.create_model('res2net50_vd_26w_4s', output_stride=8, dilate_pool=True, **small('res2net50d'))
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    for converted in (
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net', 'blres2net50_26w_4s', 'res2next29_6c_24w_4s'])
def test_output_stride_none_equals_default(name: str) -> None:
    features = timm.models.model_entrypoint(name)(features_only=True, output_stride=None, device='meta')
    usual = timm.create_model(name, features_only=True, device='meta')
    assert features.feature_info.reduction() == usual.feature_info.reduction()


@pytest.mark.parametrize('name', ARCHS)
def test_out_indices_beyond_feature_count_raise_value_error(name: str) -> None:
    count = ARCHS[name].features
    for indices in ((0, count), (-count - 1,), count + 1):
        with pytest.raises(ValueError, match=f'it has {count}, 0 to {count - 1} or, from the end, -{count} to -1'):
            timm.create_model(name, features_only=True, out_indices=indices, device='meta', **small(name))
    for indices, number in (((0, count - 1), 2), ((-count, -1), 2), (2, 2), (count, count)):
        model = timm.create_model(name, features_only=True, out_indices=indices, device='meta', **small(name))
        assert len(model.feature_info.channels()) == number


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net', 'blres2net50_26w_4s'])
def test_output_stride_unsupported_raises_and_lists_choices(name: str) -> None:
    possible = '16 or 32' if name.startswith('bl') else '8, 16 or 32'
    with pytest.raises(ValueError, match=f'output_stride=4 is not possible; choose {possible}'):
        timm.create_model(name, features_only=True, output_stride=4, device='meta')


@pytest.mark.parametrize('name', KINDS)
def test_features_only_image_smaller_than_stride_gives_one_pixel(name: str) -> None:
    model = timm.create_model(name, features_only=True, device='meta', **small(name)).eval()
    assert model(torch.empty(1, 3, 7, 5, device='meta'))[-1].shape[2:] == (1, 1)


# Norms


@pytest.mark.parametrize('name', ['res2net50d', 'dla60_res2net', 'blres2net50_26w_4s', 'res2next29_6c_24w_4s'])
@pytest.mark.parametrize(
    'norm_layer',
    [
        torchvision.ops.FrozenBatchNorm2d,
        partial(FrozenBatchNormAct2d, apply_act=False),
        partial(GroupNorm, num_groups=1),
        'groupnorm1',
        nn.SyncBatchNorm,
    ],
    ids=['torchvision frozen', 'timm frozen', 'group', 'groupnorm1', 'sync'],
)
def test_norm_layer_of_every_kind_loads_batch_norm_weights(name: str, norm_layer: Any, images: Tensor) -> None:
    arguments = small(name)
    torch.manual_seed(0)
    plain = randomise(timm.create_model(name, **arguments)).double().eval()
    model = timm.create_model(name, norm_layer=norm_layer, **arguments).double().eval()
    images = images[..., :32, :32].double()
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == []
    if 'group' not in str(norm_layer).lower():
        torch.testing.assert_close(model(images), plain(images))
    else:
        assert model(images).isfinite().all()
    if 'frozen' in str(norm_layer).lower():
        assert all('bn' not in key for key, _ in model.named_parameters())


@pytest.mark.parametrize('name', ['res2net50d', 'dla60_res2net', 'blres2net50_26w_4s'])
def test_batch_norm_frozen_unfrozen_or_synchronised_keeps_output(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, **small(name))).eval()
    expected = model(images)
    frozen = freeze_batch_norm_2d(model)
    torch.testing.assert_close(frozen.train()(images), expected, rtol=1e-4, atol=1e-4)
    thawed = unfreeze_batch_norm_2d(frozen).eval()
    torch.testing.assert_close(thawed(images), expected, rtol=1e-4, atol=1e-4)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(thawed).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    torch.testing.assert_close(synchronised(images), expected, rtol=1e-4, atol=1e-4)
