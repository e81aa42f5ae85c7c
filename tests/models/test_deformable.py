"""Deformable convolutions sample where their offsets say, and train, export and fuse like plain ones."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import randomise, tiny
from torch import Tensor, nn

from timm_res2net import fuse
from timm_res2net.models.deformable import VERSIONS, DeformableConv2d

DEFORMABLE: dict[str, Any] = dict(deformable=(None, 'v1', 'v2', 'v2'))


def with_offsets(model: nn.Module) -> nn.Module:
    """Gives every deformable convolution offsets of about a pixel."""
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            nn.init.normal_(module.conv_offset.weight, std=0.1)
            nn.init.normal_(module.conv_offset.bias, std=0.5)
    return model


def sampled(conv: Any, x: Tensor) -> Tensor:
    """The equation of a deformable convolution without groups, with one bilinear sample for each tap and position."""
    (stride, _), (dilation, _) = conv.stride, conv.dilation
    made = F.conv2d(x, conv.conv_offset.weight, conv.conv_offset.bias, stride, dilation, dilation)
    mask = made[:, 18:].sigmoid() if conv.has_mask else torch.ones_like(made[:, :9])
    height, width = x.shape[2:]
    rows = torch.arange(made.shape[2], dtype=x.dtype)[:, None] * stride
    columns = torch.arange(made.shape[3], dtype=x.dtype)[None] * stride
    total = torch.zeros(())
    for tap in range(9):
        y = rows + (tap // 3 - 1) * dilation + made[:, 2 * tap]
        z = columns + (tap % 3 - 1) * dilation + made[:, 2 * tap + 1]
        grid = torch.stack([2 * z / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
        sample = F.grid_sample(x, grid, align_corners=True) * mask[:, tap : tap + 1]
        total = total + torch.einsum('nchw,oc->nohw', sample, conv.weight[:, :, tap // 3, tap % 3])
    return total


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_deformable_conv_equals_bilinear_samples(version: str, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = with_offsets(DeformableConv2d(3, 5, stride, dilation, version=version).double())
    x = torch.randn(2, 3, 9, 8, dtype=torch.double)
    torch.testing.assert_close(conv(x), sampled(conv, x))


@pytest.mark.parametrize(('version', 'factor'), [('v1', 1.0), ('v2', 0.5)])
def test_deformable_conv_begins_as_the_plain_one_times_its_mask(version: str, factor: float) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=False).double()
    conv = DeformableConv2d.like(plain, version)
    x = torch.randn(2, 6, 9, 8, dtype=torch.double)
    torch.testing.assert_close(conv(x), factor * plain(x))
    assert conv.weight is plain.weight


def test_res2net_deformable_version_1_begins_as_the_plain_network(images: Tensor) -> None:
    plain, deformable = tiny().double(), tiny(deformable=('v1',) * 4).double()
    missing = deformable.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all('conv_offset' in name for name in missing)
    torch.testing.assert_close(deformable(images.double()), plain(images.double()))


def test_res2net_deformable_stages_have_the_names_of_mmcv() -> None:
    state = tiny(**DEFORMABLE).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if 'conv_offset' in name}
    assert not any(name.startswith('layer1') for name in shapes)
    assert shapes['layer2.0.convs.0.conv_offset.weight'] == (18, 4, 3, 3)
    assert shapes['layer3.0.convs.1.conv_offset.bias'] == (27,)


def test_res2net_deformable_initialisation_zeroes_offsets() -> None:
    model: Any = with_offsets(tiny(**DEFORMABLE))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            assert not module.conv_offset.weight.any()
            assert module.weight.any()


def test_res2net_deformable_gradients_reach_offsets_and_checkpointing_keeps_them(images: Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model: Any = with_offsets(tiny(**DEFORMABLE)).train()
        torch.manual_seed(0)
        with_offsets(model)
        model.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize('first_block', ['official', 'mmdet', 'group'])
def test_fuse_deformable_model_computes_the_same(first_block: str, images: Tensor) -> None:
    model = with_offsets(tiny(first_block, **DEFORMABLE))
    expected = model(images)
    torch.testing.assert_close(fuse(model)(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_res2net_deformable_scripts_traces_and_exports(images: Tensor) -> None:
    model = with_offsets(tiny(**DEFORMABLE))
    expected = model(images)
    for converted in (
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (images,)).module(),
    ):
        torch.testing.assert_close(converted(images), expected, rtol=1e-4, atol=1e-4)


def test_create_model_deformable_gives_features_of_the_same_shapes(images: Tensor) -> None:
    plain = tiny(features_only=True)
    features = randomise(tiny(features_only=True, **DEFORMABLE)).eval()
    assert [each.shape for each in features(images)] == [each.shape for each in plain(images)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(deformable=(None, None, None, 'v3')), "deformable='v3' is not known; choose from None, v1, v2"),
        (dict(deformable=('v2',)), 'must have an entry for each of 4 stages'),
    ],
)
def test_create_model_wrong_deformable_raises_value_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_res2net', **arguments)
